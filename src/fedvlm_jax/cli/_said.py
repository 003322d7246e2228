"""Which flags somebody wrote: an option at its default looks the same whether it was asked for or not."""

from collections.abc import Sequence
from contextvars import ContextVar

__all__ = ["find_said", "note_flags", "was_said"]

_FLAGS: ContextVar[frozenset[str]] = ContextVar("flags", default=frozenset())


def note_flags(words: Sequence[str]) -> None:
    """Remember the flags among the words of the command line."""
    _FLAGS.set(frozenset(word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")))


def find_said() -> frozenset[str]:
    """All flags that were written."""
    return _FLAGS.get()


def was_said(*flags: str) -> bool:
    """Was one of these written?"""
    return not _FLAGS.get().isdisjoint(flags)
