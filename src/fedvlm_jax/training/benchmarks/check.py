"""A line of somebody's rerun in part, and held against what comes out here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedvlm_jax.config.benchmark import Benchmark, check_comparison
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.track_options import TrackOptions
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.statistics.over_seeds import Estimate, estimate_mean, subtract_scores
from fedvlm_jax.run_dir.benchmark_entry import Entry, Row, take_numbers
from fedvlm_jax.training.benchmarks.measure import measure
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import Progress, SilentProgress


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
    if comparison.method_options:
        raise UserError("a row is rerun with the numbers of its line: leave out method_options")
    numbers = take_numbers(entry, comparison.methods)
    if comparison.seeds > len(entry.seeds):
        raise UserError(f"--seeds is {comparison.seeds}, and the line has {format_count(len(entry.seeds), 'seed')}")
    comparison = replace(comparison, method_options=numbers)
    check_comparison(benchmark, comparison)
    rates = {row.method: row.rates for row in entry.rows if row.rates is not None}
    show = show or SilentProgress()
    model = load_model(comparison.base, show.note, lambda sources: _refuse_other(entry, sources))
    rerun = measure(benchmark, comparison, rates, show, model, track)
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
