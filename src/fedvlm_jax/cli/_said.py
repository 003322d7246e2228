"""The words of the command line: an option at its default looks the same whether it was asked for or not."""

from collections.abc import Sequence
from contextvars import ContextVar

_WORDS: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


def note_words(words: Sequence[str]) -> None:
    """Remember the words of the command line, and so the flags among them."""
    _WORDS.set(tuple(words))


def list_words() -> tuple[str, ...]:
    """All words after `fedvlm`."""
    return _WORDS.get()


def find_said() -> frozenset[str]:
    """All flags that were written."""
    return frozenset(word.partition("=")[0].replace("_", "-") for word in list_words() if word.startswith("--"))


def was_said(*flags: str) -> bool:
    """Was one of these written?"""
    return not find_said().isdisjoint(flags)
