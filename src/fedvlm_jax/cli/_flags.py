"""The words of the command line: an option at its default looks the same whether it was asked for or not.

`--lr` stands for two options, which take its place before the words are kept.
"""

from collections.abc import Sequence
from contextvars import ContextVar

from fedvlm_jax.errors import UserError

WORDS: ContextVar[tuple[str, ...]] = ContextVar("words", default=())  # all words after `fedvlm`
RATE = "--lr"
RATES = ("--train.learning-rate-a", "--train.learning-rate-b")


def find_flags(words: Sequence[str]) -> list[str]:
    """Return the flag in each word, as tyro spells it; other words as they are.

    >>> find_flags(["train", "--train.local_steps=3"])
    ['train', '--train.local-steps']
    """
    return [word.partition("=")[0].replace("_", "-") for word in words]


def find_written() -> frozenset[str]:
    """Return all flags that were written on the command line."""
    return frozenset(flag for flag in find_flags(WORDS.get()) if flag.startswith("--"))


def expand_rate(words: Sequence[str]) -> list[str]:
    """Replace `--lr X` by the two options that it sets.

    Raises:
        UserError: it has no value, or one of the two is there as well.

    >>> expand_rate(["train", "--lr", "1e-3"])
    ['train', '--train.learning-rate-a', '1e-3', '--train.learning-rate-b', '1e-3']
    """
    written = find_flags(words)
    if RATE not in written:
        return list(words)
    if other := next((flag for flag in RATES if flag in written), None):
        raise UserError(f"{RATE} sets {' and '.join(RATES)}: leave out {RATE} or {other}")
    place = written.index(RATE)
    _, equals, value = words[place].partition("=")
    end = place + 1 if equals else place + 2
    value = value if equals else "".join(words[place + 1 : end])
    if not value or value.startswith("--"):
        raise UserError(f"{RATE}: expected a learning rate, which is then that of A and of B")
    return [*words[:place], *(word for flag in RATES for word in (flag, value)), *words[end:]]
