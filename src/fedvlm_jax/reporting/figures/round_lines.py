"""Numbers read off the lines of `metrics.jsonl`, a line per round, to be drawn over the rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedvlm_jax.run_dir.reader import ComparisonRecord, read_metrics

Lines = Sequence[Mapping[str, Any]]
Rounds = Mapping[str, Sequence[Lines]]  # method -> the lines of each of its runs
Line = tuple[list[int], list[float]]  # rounds, and the values at them


def read_rounds(record: ComparisonRecord) -> Rounds:
    """Read the lines of all runs of a comparison by method; a run whose folder is gone is left out."""
    rounds: dict[str, list[Lines]] = {}
    for run in record.runs:
        if lines := read_metrics(record.folder_of(run)):
            rounds.setdefault(run["method"], []).append(lift_validation(lines, record.metric))
    return rounds


def lift_validation(lines: Lines, metric: str) -> Lines:
    """Put a metric of validation into each line itself: its value, those before and after redistribution, its gain.

    >>> validation = {"f1": 0.5, "before_redistribution": {"f1": 0.25}, "after_redistribution": {"f1": 0.5}}
    >>> lift_validation([{"round": 1, "validation": validation}], "f1")
    [{'round': 1, 'validation': 0.5, 'before': 0.25, 'after': 0.5, 'redistribution': 0.25}]
    """
    lifted = []
    for line in lines:
        found = line.get("validation") or {}
        before, after = ((found.get(f"{side}_redistribution") or {}).get(metric) for side in ("before", "after"))
        gain = None if before is None or after is None else after - before
        scores = {"validation": found.get(metric), "before": before, "after": after, "redistribution": gain}
        lifted.append({**line, **scores})
    return lifted


def pick(lines: Lines, key: str, scale: float = 1.0) -> Line:
    """Pick the rounds that have a number, and their values times `scale`.

    >>> pick([{"round": 1, "loss": 0.5}, {"round": 2}, {"round": 3, "loss": 0.25}], "loss", 100)
    ([1, 3], [50.0, 25.0])
    """
    found = [(line["round"], line.get(key)) for line in lines]
    finite = [(number, scale * value) for number, value in found if value is not None and np.isfinite(value)]
    return [number for number, _ in finite], [value for _, value in finite]


def average(runs: Sequence[Line]) -> Line:
    """Average over runs at the rounds that all have, or at those of the first where they have none in common."""
    readings = [dict(zip(*run, strict=True)) for run in runs if run[0]]
    if not readings:
        return [], []
    rounds = sorted(set.intersection(*map(set, readings)) or readings[0])
    return rounds, [float(np.mean([reading[at] for reading in readings if at in reading])) for at in rounds]
