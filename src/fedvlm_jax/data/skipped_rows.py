"""Rows that are left out, and why: the reasons that are counted, shown and stored with a run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.table import LOST, OUTSIDE, UNREADABLE, Table


@dataclass(frozen=True)
class Skipped:
    """A row that is not used, and why. `idx` is the data set's name for it, where it has one."""

    row: int
    idx: str | None
    reason: str


def skip_rows(table: Table, rows: Int[np.ndarray, " rows"], reasons: Sequence[str]) -> tuple[Skipped, ...]:
    """Pair each of these rows with its reason."""
    idx = table.read_text("idx", rows) if "idx" in table.columns else [None] * len(rows)
    return tuple(Skipped(int(row), name, reason) for row, name, reason in zip(rows, idx, reasons, strict=True))


def count_reasons(skipped: Sequence[Skipped]) -> dict[str, int]:
    """Count the rows of every reason, the most frequent first.

    >>> count_reasons([Skipped(3, None, "no image"), Skipped(5, None, "empty answer"), Skipped(8, None, "no image")])
    {'no image': 2, 'empty answer': 1}
    """
    return dict(Counter(entry.reason for entry in skipped).most_common())


def find_text_fault(question: str, chosen: str) -> str | None:
    """Say why nothing can be learnt from a row's question and answer (without spaces around them), if so.

    >>> find_text_fault("What is this?", "")
    'empty answer'
    """
    for name, text in (("question", question), ("answer", chosen)):
        if not text:
            return f"empty {name}"
        if text == UNREADABLE:
            return f"{name} is not UTF-8"
    return None


def find_pair_fault(chosen: str, rejected: str) -> str | None:
    """Say why two answers (without spaces around them) state no preference, if so.

    >>> find_pair_fault("a cat", "a cat")
    'chosen equals rejected'
    """
    if not rejected:
        return "empty rejected answer"
    if rejected == UNREADABLE:
        return "rejected answer is not UTF-8"
    return "chosen equals rejected" if chosen == rejected else None


def describe_skipped(table: Table, skipped: Sequence[Skipped]) -> str:
    """Say how many rows are left out and why, with what was looked for where a file was: sentences, or nothing."""
    if not skipped:
        return ""
    reasons = ", ".join(f"{count} × {reason}" for reason, count in count_reasons(skipped).items())
    return f"Rows left out: {reasons}. {describe_lost(table, skipped)}"


def describe_lost(table: Table, skipped: Sequence[Skipped]) -> str:
    """Say of the first image file that was not read what was looked for and where: a sentence, or nothing."""
    for entry in skipped:
        if entry.reason in (LOST, OUTSIDE) and (lookup := table.describe_lookup(entry.row)):
            return f"For row {entry.row} it {lookup}. "
    return ""
