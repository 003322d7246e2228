"""Benchmarks by name: a set-up that anybody can rerun, and whose table others can enter.

A benchmark is a file of `assets/benchmarks`: data, partition, model, budget, the grid of learning rates, seeds, and
what is scored. Learning rates are chosen on validation with a seed of their own; test is scored once, with the other
seeds. What a benchmark leaves out is as `fedvlm compare` has it. `setup`, a digest of the file's numbers, is in every
line of its table: figures of another set-up stand in another table.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.option_checks import plain, validate_comparison
from fedvlm_jax.config.run_options import Run, TrainOptions, from_json, to_json
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils.option_ranges import list_options
from fedvlm_jax.utils.serialization import fit

FOLDER = Path(__file__).parents[1] / "assets" / "benchmarks"
FREE = ("--system.", "--out", "--data.path", "--data.image-root")
"""Beginnings of the options that whoever reruns a benchmark may choose: they do not change what is measured."""
BOUND = "--system.compute"
"""The one of these that does."""
NOT_COUNTED = ("about", "like", "methods", "rates", "seconds")
"""Entries of a benchmark's file that are not in the digest: other rows of the table need no other table."""

Rates = tuple[float, float]
"""Learning rates of A and of B."""


@dataclass(frozen=True)
class Benchmark:
    """A set-up that is measured in one way by everybody."""

    name: str
    version: int
    about: str
    scored: Literal["personal", "newcomers"]
    """Whose scores count: the clients' that train, or those of clients that join after training."""
    seeds: int
    """How many seeds the table has, from 0."""
    tuning_seed: int
    grid: tuple[Rates, ...]
    finetune_steps: int
    neighbours: int
    methods: tuple[str, ...]
    """Compared where none are named."""
    seconds: float
    """A method with a seed takes about so long on two cores."""
    rates: Mapping[str, Rates]
    """Method -> the rates that the grid and the tuning seed gave; others are tuned when they are run."""
    run: Run
    setup: str
    """Digest of all that decides what is measured."""

    def make_comparison(self, out: Path | None = None) -> Compare:
        """Return the comparison that the table has, whole.

        >>> find_benchmark("emoji-16").make_comparison().seeds
        5
        """
        return Compare(
            methods=self.methods,
            seeds=self.seeds,
            finetune_steps=self.finetune_steps,
            neighbours=self.neighbours,
            base=replace(self.run, out=out),
        )

    @property
    def metric(self) -> str:
        """Return the metric of its scores: that by which its runs choose their rounds.

        >>> find_benchmark("emoji-16").metric
        'exact_match'
        """
        return self.run.evaluation.select_by or load_objective(self.run.objective, self.run.preference).select_by

    def train_with(self, rates: Rates) -> TrainOptions:
        """Return the training options with other learning rates of A and of B."""
        return replace(self.run.train, learning_rate_a=rates[0], learning_rate_b=rates[1])


def list_benchmarks() -> tuple[str, ...]:
    """List the benchmarks that ship.

    >>> list_benchmarks()
    ('emoji-16', 'emoji-16-neutral', 'emoji-newcomers', 'photos-languages')
    """
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark.

    Raises:
        UserError: there is none of this name.

    >>> find_benchmark("emoji-16").run.train.rounds
    12
    """
    if name not in list_benchmarks():
        raise UserError(f"--benchmark {name}: there are {', '.join(list_benchmarks())}")
    content = _read_file(name)
    options = content["options"]
    data = options["data"]
    start = to_json(Run(data=make_options(data["source"], data["partition"]["kind"])))
    counted = {key: value for key, value in content.items() if key not in NOT_COUNTED}
    text = json.dumps({"name": name, **counted}, sort_keys=True)
    return Benchmark(
        name=name,
        version=content["version"],
        about=content["about"].strip(),
        scored=content["scored"],
        seeds=content["seeds"],
        tuning_seed=content["tuning_seed"],
        grid=fit(tuple[Rates, ...], content["grid"], "grid"),
        finetune_steps=content["finetune_steps"],
        neighbours=content["neighbours"],
        methods=tuple(content["methods"]),
        seconds=content["seconds"],
        rates={method: fit(Rates, rates, method) for method, rates in content["rates"].items()},
        run=from_json(_overlay(start, options)),
        setup=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _read_file(name: str) -> dict[str, Any]:
    """Read a benchmark's file, laid over that of the benchmark which it is like; rates are those of one set-up only."""
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    if "like" not in content:
        return content
    other = _read_file(content["like"])
    if content["options"].get("data", {}).get("source"):
        other["options"].pop("data")  # another source has other options
    return _overlay({**other, "rates": {}}, content)


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested entries over others.

    >>> _overlay({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}})
    {'a': 1, 'b': {'c': 4, 'd': 3}}
    """
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _overlay(cast("Mapping[str, Any]", under), value) if both else value
    return merged


def check_comparison(benchmark: Benchmark, comparison: Compare) -> None:
    """Refuse a comparison that is not the benchmark's: all but its methods, its seeds and `FREE` is settled.

    Raises:
        UserError: the first option that is another, a method that its model cannot have, or more seeds than the table
            has.
    """
    validate_comparison(comparison)
    if comparison.seeds > benchmark.seeds:
        raise UserError(f"--seeds is {comparison.seeds}, and {benchmark.name} has {benchmark.seeds}: ask for fewer")
    settled = {option.flag: option.value for option in list_options(benchmark.make_comparison())}
    for option in list_options(comparison):
        free = option.flag in ("--methods", "--seeds", "--processes") or option.flag.startswith((*FREE, "--method."))
        if (not free or option.flag == BOUND) and option.value != settled.get(option.flag, option.value):
            raise UserError(
                f"{option.flag} is settled by --benchmark {benchmark.name}, as {settled[option.flag]}: leave it out, "
                "or leave out --benchmark"
            )
    chooses = load_objective(benchmark.run.objective, benchmark.run.preference).classes
    for name in comparison.methods:
        if declare(plain(name), benchmark.run).classes and not chooses:
            raise UserError(
                f"--methods {name} is for models that choose among classes, and {benchmark.name} has "
                f"{benchmark.run.model}, which writes its answers: leave it out"
            )


def list_untuned(benchmark: Benchmark, comparison: Compare) -> tuple[str, ...]:
    """List the methods whose learning rates are not known: new ones, and those with other numbers than their defaults.

    >>> benchmark = find_benchmark("emoji-16")
    >>> list_untuned(benchmark, replace(benchmark.make_comparison(), methods=("local", "rolora")))
    ('rolora',)
    """
    changed = {name for name, numbers in comparison.method_options.items() if numbers != type(numbers)()}
    return tuple(name for name in comparison.methods if name not in benchmark.rates or plain(name) in changed)
