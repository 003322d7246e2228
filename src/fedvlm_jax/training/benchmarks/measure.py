"""A benchmark run: learning rates tuned where they are not known, then every method with every seed, tested once.

In the comparison's folder, beside what a comparison leaves, are `tuning/`, a comparison for each point of the grid that
never reads the test split, and `line.json`, the line for the benchmark's table. All goes on where it was stopped.
"""

from collections.abc import Mapping
from dataclasses import replace
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
from fedvlm_jax.evaluation.statistics.over_seeds import BySeed, estimate_mean
from fedvlm_jax.methods.config import find_method_options
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.run_dir.benchmark_entry import ZERO_SHOT, Entry, Row, write_entry
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
    return measure(benchmark, comparison, rates, show, model, track)


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


def measure(
    benchmark: Benchmark,
    comparison: Compare,
    rates: Mapping[str, Rates],
    show: Progress,
    model: LoadedModel,
    track: TrackOptions,
) -> Entry:
    """Run every method with its learning rates and every seed; write the line and return it.

    Raises:
        UserError: as `compare`.
    """
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
                round(sum((run["seconds"] for run in runs), 0.0), 1),
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
