"""Interleaved runs: whatever else a machine is busy with meets all contestants alike, so ratios outlive it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Measured = TypeVar("Measured")


def interleave(contestants: Mapping[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """Run all contestants in turn, `repeats` times over.

    Args:
        contestants: name -> runs once and returns what was measured, seconds for example.
        repeats: how often.

    Returns:
        name -> what was measured, in the order of the runs.
    """
    found: dict[str, list[Measured]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            found[name].append(run())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def describe_times(seconds: Sequence[float]) -> dict[str, float | list[float]]:
    """The median and all of it, for JSON."""
    return {"median": round(statistics.median(seconds), 4), "all": [round(value, 4) for value in seconds]}
