"""A benchmark run: learning rates tuned where they are not known, then every method with every seed, tested once.

In the comparison's folder, beside what a comparison leaves, are `tuning/`, a comparison for each point of the grid that
never reads the test split, and `line.json`, the line for the benchmark's table. All goes on where it was stopped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from fedvlm_jax.config.benchmark import Benchmark, Rates, check_comparison, list_untuned
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import plain
from fedvlm_jax.config.track_options import TrackOptions
from fedvlm_jax.data.config import Split
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.statistics.over_seeds import BySeed, Estimate, estimate_mean, subtract_scores
from fedvlm_jax.methods.config import MethodOptions, find_method_options
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.run_dir.benchmark_entry import ZERO_SHOT, Entry, Row, check_known, write_entry
from fedvlm_jax.run_dir.reader import ComparisonRecord, drop_missing, read_comparison
from fedvlm_jax.training import compare as comparing
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.utils.files import write_text
from fedvlm_jax.utils.progress import Progress, SilentProgress
from fedvlm_jax.utils.serialization import encode

LINE = "line.json"
"""In the folder: the benchmark's line."""


def run_benchmark(
    benchmark: Benchmark,
    comparison: Compare,
    show: Progress | None = None,
    model: LoadedModel | None = None,
    track: TrackOptions = TrackOptions(),  # noqa: B008  frozen
) -> Entry:
    """Measure the comparison's methods with its seeds, and write the line of what came out.

    A model that earlier runs have loaded saves a start.

    Raises:
        UserError: an option is settled otherwise by the benchmark; or as `compare`.
    """
    check_comparison(benchmark, comparison)
    show = show or SilentProgress()
    untuned = list_untuned(benchmark, comparison)
    runs = len(comparison.methods) * comparison.seeds + len(untuned) * len(benchmark.grid)
    minutes = runs * benchmark.seconds / 60
    show.note(f"{benchmark.about} {format_count(runs, 'run')}: about {minutes:.0f} min on two cores, and compiling")
    model = model or load_model(comparison.base, show.note)
    rates = dict(benchmark.rates)
    if untuned:
        rates |= _tune(benchmark, comparison, untuned, show, model)
    return _measure(benchmark, comparison, rates, show, model, track)


def _tune(
    benchmark: Benchmark, comparison: Compare, methods: tuple[str, ...], show: Progress, model: LoadedModel
) -> dict[str, Rates]:
    """Choose the rates that do best on validation with the tuning seed; the first of equals."""
    base = comparison.base
    assert base.out is not None
    points, seed = format_count(len(benchmark.grid), "pair"), benchmark.tuning_seed
    show.note(f"tuning {', '.join(methods)}: {points} of learning rates, on validation with seed {seed}")
    found: dict[str, list[float]] = {method: [] for method in methods}
    for number, rates in enumerate(benchmark.grid):
        point = replace(
            base,
            seed=benchmark.tuning_seed,
            train=benchmark.train_with(rates),
            evaluation=replace(base.evaluation, test=False),
            out=base.out / "tuning" / str(number),
        )
        tried = replace(comparison, methods=methods, seeds=1, base=point)
        record = read_comparison(comparing.compare(_keep_numbers(tried), show, model))
        for method in methods:
            found[method].append(estimate_mean(_read_scores(benchmark, record, method, "validation")).mean)
    return {method: benchmark.grid[int(np.argmax(scores))] for method, scores in found.items()}


def _keep_numbers(comparison: Compare) -> Compare:
    """Leave out the numbers of methods that are not compared."""
    compared = set(map(plain, comparison.methods))
    kept = {name: numbers for name, numbers in comparison.method_options.items() if name in compared}
    return replace(comparison, method_options=kept)


def _measure(
    benchmark: Benchmark,
    comparison: Compare,
    rates: Mapping[str, Rates],
    show: Progress,
    model: LoadedModel,
    track: TrackOptions,
) -> Entry:
    settings = {method: benchmark.train_with(rates[method]) for method in comparison.methods}
    folder = comparing.compare(_keep_numbers(comparison), show, model, settings, track)
    record = read_comparison(folder)
    entry = _describe(benchmark, comparison, record, rates, model)
    if processes.is_first():
        write_text(folder / LINE, write_entry(entry) + "\n", sync=True)
    return entry


def _read_scores(benchmark: Benchmark, record: ComparisonRecord, method: str, split: Split) -> BySeed:
    """Return the scores that count by seed and client."""
    if benchmark.scored == "personal":
        return record.scores(method, split=split)
    model, name = ("zero_shot", record.methods[0]) if method == ZERO_SHOT else ("personal", method)
    held_out: dict[int, Any] = {run["seed"]: run.get("held_out") for run in record.runs if run["method"] == name}
    if not all(held_out.values()):
        raise UserError(f"{benchmark.name} has a seed without newcomers: there are too few clients")
    return {seed: drop_missing(found[model][split][record.metric]) for seed, found in sorted(held_out.items())}


def _describe(
    benchmark: Benchmark,
    comparison: Compare,
    record: ComparisonRecord,
    rates: Mapping[str, Rates],
    model: LoadedModel,
) -> Entry:
    rows = list[Row]()
    for method in (ZERO_SHOT, *comparison.methods):
        runs = [run for run in record.runs if run["method"] == method]
        scores = _read_scores(benchmark, record, method, "test")
        rows.append(
            Row(
                method,
                rates.get(method),
                encode(comparison.method_options.get(plain(method), find_method_options(plain(method))())),
                {str(seed): {client: round(score, 6) for client, score in by.items()} for seed, by in scores.items()},
                float(np.mean([run["bytes_up_per_client"] for run in runs])) if runs else None,
                round(sum(run["seconds"] for run in runs), 1),
            )
        )
    about, device = describe_environment(), jax.devices()[0]
    sources = model.sources(comparison.base.data)
    return Entry(
        benchmark=benchmark.name,
        version=benchmark.version,
        setup=benchmark.setup,
        metric=record.metric,
        seeds=tuple(record.seeds),
        rows=tuple(rows),
        data=sources["data"],
        weights=sources["weights"],
        package=about["versions"]["fedvlm-jax"] or "",
        jax=jax.__version__,
        machine={**about["machine"], "devices": f"{jax.device_count()} {device.device_kind}"},
        commit=about["commit"],
        seconds=round(sum(row.seconds for row in rows), 1),
    )


@dataclass(frozen=True)
class Verdict:
    """A row of somebody's line, and the same rerun with some of its seeds."""

    method: str
    claimed: Estimate
    seeds: tuple[int, ...]
    """Those that were rerun."""
    difference: float
    """The rerun's mean minus the line's, of these seeds."""

    @property
    def reproduced(self) -> bool:
        """Tell whether the line's mean, moved by the difference, stays in its interval.

        >>> Verdict("local", Estimate(0.42, 0.40, 0.44, "seeds"), (0,), -0.03).reproduced
        False
        """
        return self.claimed.low <= self.claimed.mean + self.difference <= self.claimed.high


def check_entry(
    benchmark: Benchmark,
    entry: Entry,
    comparison: Compare,
    show: Progress | None = None,
    track: TrackOptions = TrackOptions(),  # noqa: B008  frozen
) -> list[Verdict]:
    """Rerun the comparison's methods and seeds with the learning rates and numbers of a line, which has them.

    Data and weights must be those that the line names. Seeds are the line's own, so what separates seeds cancels, and
    the interval is the bound for what versions and machines may differ by.

    Raises:
        UserError: the line has no such rows or seeds, or was measured on other data or another base.
    """
    if any(numbers != type(numbers)() for numbers in comparison.method_options.values()):
        raise UserError("--check reruns a row with the numbers of its line: leave out --method.*")
    check_known(entry, comparison.methods)
    if comparison.seeds > len(entry.seeds):
        raise UserError(f"--seeds is {comparison.seeds}, and the line has {format_count(len(entry.seeds), 'seed')}")
    numbers = {plain(name): entry.row(name).make_options() for name in comparison.methods}
    given = {name: options for name, options in numbers.items() if type(options) is not MethodOptions}
    comparison = replace(comparison, method_options=given)
    check_comparison(benchmark, comparison)
    rates = {row.method: row.rates for row in entry.rows if row.rates is not None}
    show = show or SilentProgress()
    model = load_model(comparison.base, show.note, lambda sources: _refuse_other(entry, sources))
    rerun = _measure(benchmark, comparison, rates, show, model, track)
    return [judge_row(entry.row(method), rerun.row(method)) for method in comparison.methods]


def _refuse_other(entry: Entry, sources: Mapping[str, Any]) -> None:
    for what, name in (("data", "data"), ("base", "weights")):
        if sources[name] != getattr(entry, name):
            raise UserError(f"the line was measured on another version of the {what} than there is here")


def judge_row(claimed: Row, rerun: Row) -> Verdict:
    """Hold a row against its rerun.

    Raises:
        UserError: they have not the same clients in the rerun's seeds.
    """
    seeds = tuple(rerun.by_seed)
    mine = {seed: claimed.by_seed[seed] for seed in seeds}
    if any(mine[seed].keys() != rerun.by_seed[seed].keys() for seed in seeds):
        raise UserError(f"the clients of {claimed.method} in the line are not those of the benchmark")
    difference = estimate_mean(subtract_scores(rerun.by_seed, mine)).mean
    return Verdict(claimed.method, estimate_mean(claimed.by_seed), seeds, difference)
