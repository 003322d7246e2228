"""Standard output and error as they are: some know only ASCII, and some are gone before all is said.

No heavy package is imported here.
"""

import codecs
import os
import select
import sys
from typing import Any, TextIO

__all__ = ["PIPE_GONE", "is_reader_gone", "leave_out_told", "silence", "soften", "to_ascii"]

PIPE_GONE = 141
"""Exit code of a command whose reader left, as `head` does: 128 and the number of SIGPIPE."""

PLAIN = {
    "–": "-", "−": "-", "—": "-", "…": "...", "±": "+-", "≈": "~", "▲": "^", "▼": "v", "→": "->", "×": "x", "·": "*",
    "✓": "+", "✗": "x", "█": "#", "∞": "inf", "≤": "<=", "≥": ">=", "θ": "theta", "η": "eta", "Σ": "sum", "α": "alpha",
    "λ": "lambda", "“": '"', "”": '"', "’": "'", "‘": "'", "\N{NO-BREAK SPACE}": " ", "Δ": "d", "√": "sqrt",
    "─": "-", "━": "=", "│": "|", "╸": "=", "╺": "=",
}  # fmt: skip
"""What stands for our own signs where there is nothing but ASCII."""


def silence() -> None:
    """Lead both outputs nowhere, so that what Python still has to write at its end is no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def is_reader_gone() -> bool:
    """Has whoever read what the command prints left, as `head` does?"""
    return any(map(_is_gone, (sys.stdout, sys.stderr)))


def _is_gone(stream: TextIO | None) -> bool:
    try:
        asked = select.poll()
        asked.register(stream.fileno(), 0) if stream is not None else None
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    except (OSError, ValueError, AttributeError):  # a test's stand-in has no descriptor, Windows no poll
        return False


def soften() -> None:
    """Have outputs write a stand-in for what their encoding lacks, in place of an error."""
    codecs.register_error("fedvlm", _replace)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)  # a test's stand-in has none
        if reconfigure is not None:
            reconfigure(errors="fedvlm")


def leave_out_told() -> None:
    """Have no traceback of what a disk's own error tells already.

    Where one of several writes of a checkpoint fails, orbax closes the event loop in which the others end, and the
    threads of tensorstore, which end them, tell so wherever they are.
    """
    sys.unraisablehook = _tell_unraisable


def _tell_unraisable(found: "sys.UnraisableHookArgs") -> None:
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


def to_ascii(text: str) -> str:
    """Write a text in ASCII: our own signs by stand-ins, what is left as escapes."""
    return text.encode("ascii", "fedvlm").decode("ascii") if not text.isascii() else text


def _replace(error: UnicodeError) -> tuple[str, int]:
    """What a codec writes in place of characters that it lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or _escape(letter) for letter in letters), error.end


def _escape(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error("fedvlm", _replace)
