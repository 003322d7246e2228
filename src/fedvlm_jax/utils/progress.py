"""The progress of a run: what it reports to, without knowing whether it is drawn, written or kept."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

COMPILING = "compiling the round: about a minute the first time, seconds where it is kept from an earlier run"
"""The shipped model's takes 15 s on two quiet cores; Florence-2-base's a minute, on a busy machine more."""


class Progress(Protocol):
    """The place where a run reports how far it is; who derives from it overrides what is to be shown."""

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Begin a run, of which `done` rounds are finished already; `evaluations` are those between the others."""

    def note(self, text: str) -> None:
        """Report something that is no round: what is loaded, found, written."""

    def begin(self, text: str) -> None:
        """Begin a piece of work that is no round and takes time; `working` ends it in any case."""

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Report parts of the piece of work that are done; `what` they are part of, where there are several."""

    def end(self) -> None:
        """End the piece of work."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Report a finished round."""

    def finish(self) -> None:
        """End the run, however it ended; may be called more than once."""


@contextmanager
def working(show: Progress, text: str) -> Generator[None]:
    """Show a piece of work with a running clock while the block lasts."""
    show.begin(text)
    try:
        yield
    finally:
        show.end()


class NoProgress(Progress):
    """The progress of a run in a worker: nobody reads it, so nothing is kept."""


class SilentProgress(Progress):
    """Keeps notes and lines and shows nothing, for tests and notebooks.

    >>> show = SilentProgress()
    >>> with working(show, "compiling"):
    ...     show.note("30 clients")
    >>> show.notes
    ['compiling', '30 clients']
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        """Keep the note in `notes`."""
        self.notes.append(text)

    def begin(self, text: str) -> None:
        """Keep what begins in `notes`."""
        self.notes.append(text)

    def round(self, line: Mapping[str, Any]) -> None:
        """Keep the line in `lines`."""
        self.lines.append(line)


class Numbered:
    """A progress that also says which of several runs this is.

    >>> from rich.console import Console
    >>> from fedvlm_jax.utils.progress_display import PlainProgress
    >>> Numbered(PlainProgress(Console()), number=3, total=20).start(4, "plora")
    run 3 of 20 · plora: 4 rounds
    """

    def __init__(self, show: Progress, number: int, total: int) -> None:
        self.show, self.which = show, f"run {number} of {total}"
        # Everything but the start goes straight through.
        self.note, self.begin, self.advance, self.end = show.note, show.begin, show.advance, show.end
        self.round, self.finish = show.round, show.finish

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Begin, with the number before the description."""
        self.show.start(total_rounds, f"{self.which} · {description}", done, evaluations)
