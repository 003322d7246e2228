"""Standard output and error that may know only ASCII, and whose reader may leave before all is written.

No heavy package is imported here.
"""

import codecs
import contextlib
import os
import select
import sys
from typing import Any

PIPE_GONE = 141
"""Exit code of a command whose reader left, as `head` does: 128 and the number of SIGPIPE."""

# ASCII for the signs that this package writes.
PLAIN = {
    "–": "-", "−": "-", "—": "-", "…": "...", "±": "+-", "≈": "~", "▲": "^", "▼": "v", "→": "->", "×": "x", "·": "*",
    "✓": "+", "✗": "x", "█": "#", "∞": "inf", "≤": "<=", "≥": ">=", "θ": "theta", "η": "eta", "Σ": "sum", "α": "alpha",
    "λ": "lambda", "“": '"', "”": '"', "’": "'", "‘": "'", "\N{NO-BREAK SPACE}": " ", "Δ": "d", "√": "sqrt",
    "─": "-", "━": "=", "│": "|", "╸": "=", "╺": "=",
}  # fmt: skip

# Environment of libraries, where the user's own says nothing.
QUIET = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # it tells at import that PyTorch is missing, as it should be here
    "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's compiler calls itself very slow after two minutes; what fails raises anyway
}


def quieten_libraries() -> None:
    """Have jax and transformers warn of nothing that is as it should be; before they are imported, which read it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def silence() -> None:
    """Lead both outputs nowhere, so that what Python still has to write at its end is no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def is_reader_gone() -> bool:
    """Tell whether the reader of the command's output has left, as `head` does."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it has no descriptor, Windows no poll
            asked = select.poll()
            asked.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0)):
                return True
    return False


def soften() -> None:
    """Have outputs write a stand-in for what their encoding lacks, in place of an error."""
    codecs.register_error("fedvlm", _replace_signs)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)  # a test's stand-in has none
        if reconfigure is not None:
            reconfigure(errors="fedvlm")


def silence_closed_loops() -> None:
    """Print no traceback of closed event loops: the error of the disk behind them is printed already.

    Where one of several writes of a checkpoint fails, orbax closes the event loop in which the others end, and each of
    tensorstore's threads that ends one of them raises.
    """

    def print_others(found: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            sys.__unraisablehook__(found)

    sys.unraisablehook = print_others


def to_ascii(text: str) -> str:
    r"""Write a text in ASCII: this package's signs as in `PLAIN`, other characters as escapes.

    >>> print(to_ascii("0.5 ± 0.1 → 猫"))
    0.5 +- 0.1 -> \u732b
    """
    return "".join(PLAIN.get(letter, letter) for letter in text).encode("ascii", "backslashreplace").decode()


def _replace_signs(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a codec lacks; Python calls it by its registered name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return to_ascii(error.object[error.start : error.end]), error.end
