"""What makes a row's texts unusable, in a few words: the reasons that are counted, shown and stored with a run."""

from fedvlm_jax.data.table import UNREADABLE

__all__ = ["find_pair_fault", "find_text_fault"]


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
