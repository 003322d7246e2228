"""What makes a row unusable, in a few words: the reasons that are counted, shown and stored with a run."""

from collections.abc import Sequence

from fedvlm_jax.data.federated_dataset import Skipped, count_reasons
from fedvlm_jax.data.table import LOST, OUTSIDE, UNREADABLE, Table

__all__ = ["find_pair_fault", "find_text_fault", "tell_left_out", "tell_lost"]


def find_text_fault(question: str, chosen: str) -> str | None:
    """Say why nothing can be learnt from a row's question and answer (without spaces around them), if so."""
    if not question:
        return "empty question"
    if question == UNREADABLE:
        return "question is not UTF-8"
    if not chosen:
        return "empty answer"
    return "answer is not UTF-8" if chosen == UNREADABLE else None


def find_pair_fault(chosen: str, rejected: str) -> str | None:
    """Say why two answers (without spaces around them) state no preference, if so."""
    if not rejected:
        return "empty rejected answer"
    if rejected == UNREADABLE:
        return "rejected answer is not UTF-8"
    return "chosen equals rejected" if chosen == rejected else None


def tell_left_out(table: Table, skipped: Sequence[Skipped]) -> str:
    """Say how many rows are left out and why, with what was looked for where a file was: sentences, or nothing."""
    if not skipped:
        return ""
    reasons = ", ".join(f"{count} × {reason}" for reason, count in count_reasons(skipped).items())
    return f"Rows left out: {reasons}. {tell_lost(table, skipped)}"


def tell_lost(table: Table, skipped: Sequence[Skipped]) -> str:
    """Say of the first image file that was not read what was looked for and where: a sentence, or nothing."""
    for entry in skipped:
        if entry.reason in (LOST, OUTSIDE) and (told := table.tell_image(entry.row)):
            return f"For row {entry.row} it {told}. "
    return ""
