"""Numbers read off the lines of `metrics.jsonl`, a line per round, to be drawn over the rounds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedvlm_jax.run_dir.reader import ComparisonRecord, read_metrics

Lines = Sequence[Mapping[str, Any]]
Rounds = Mapping[str, Sequence[Lines]]
"""Method -> the lines of each of its runs."""

Line = tuple[list[int], list[float]]
"""Rounds, and the values at them."""

Read = Callable[[Mapping[str, Any]], float | None]


def read_rounds(record: ComparisonRecord) -> Rounds:
    """Read the lines of all runs of a comparison by method; a run whose folder is gone is left out."""
    rounds: dict[str, list[Lines]] = {}
    for run in record.runs:
        if lines := read_metrics(record.folder_of(run)):
            rounds.setdefault(run["method"], []).append(lines)
    return rounds


def read_validation(metric: str, side: str = "") -> Read:
    """Return the reader of a validation metric, or of the same "before" or "after" redistribution."""

    def read(line: Mapping[str, Any]) -> float | None:
        found = line.get("validation") or {}
        return ((found.get(f"{side}_redistribution") or {}) if side else found).get(metric)

    return read


def pick(lines: Lines, read: Read, scale: float = 1.0) -> Line:
    """Pick the rounds that have a number, and their values times `scale`."""
    found = [(line["round"], read(line)) for line in lines]
    there = [(number, scale * value) for number, value in found if value is not None and np.isfinite(value)]
    return [number for number, _ in there], [value for _, value in there]


def average(runs: Sequence[Line]) -> Line:
    """Average over runs at the rounds that all have, or at those of the first where they have none in common."""
    readings = [dict(zip(*run, strict=True)) for run in runs if run[0]]
    if not readings:
        return [], []
    rounds = sorted(set.intersection(*map(set, readings)) or readings[0])
    return rounds, [float(np.mean([reading[at] for reading in readings if at in reading])) for at in rounds]
