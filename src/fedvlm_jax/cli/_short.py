"""Short forms of the command line that stand for more than one option, or for none."""

from collections.abc import Sequence

from fedvlm_jax import __version__
from fedvlm_jax.errors import UserError

RATE = "--lr"
RATES = ("--train.learning-rate-a", "--train.learning-rate-b")


def is_version(words: Sequence[str]) -> bool:
    """Tell whether the version is asked for, and nothing else."""
    return list(words) in (["--version"], ["-V"])


def tell_version() -> str:
    """The command's name and version."""
    return f"fedvlm {__version__}"


def expand_rate(words: Sequence[str]) -> list[str]:
    """Replace `--lr X` by the two options that it sets.

    Raises:
        UserError: it has no value, or one of the two is there as well.

    Examples:
        >>> expand_rate(["train", "--lr", "1e-3"])
        ['train', '--train.learning-rate-a', '1e-3', '--train.learning-rate-b', '1e-3']
    """
    written = [word.partition("=")[0].replace("_", "-") for word in words]
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
