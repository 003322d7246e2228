"""What a person sees while a run goes on: a live bar on a terminal, plain lines in a log, nothing in a test.

A run reports to a `Progress` and does not know which one it is. The lines that `round` takes are those of
`metrics.jsonl`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["LiveProgress", "PlainProgress", "Progress", "SilentProgress", "estimate_seconds_left", "open_progress"]

SPARKS = "▁▂▃▄▅▆▇█"


class Progress(Protocol):
    """Where a run reports how far it is."""

    def start(self, total_rounds: int, description: str, done: int = 0) -> None:
        """Begin a run of `total_rounds` rounds, of which `done` are finished already (a resumed run)."""
        ...

    def note(self, text: str) -> None:
        """Tell something that is no round: what is loaded, compiled, evaluated, written."""
        ...

    def round(self, line: Mapping[str, Any]) -> None:
        """Report a finished round."""
        ...

    def finish(self) -> None:
        """End the run, however it ended; may be called more than once."""
        ...


def open_progress(console: Console | None = None) -> Progress:
    """Return the live display on a terminal and plain lines elsewhere (a pipe, a log file, CI)."""
    console = console or Console(stderr=True)
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


def estimate_seconds_left(finished: list[float], rounds_left: int) -> float | None:
    """Estimate the time left from the moments at which rounds finished; the first round, which compiles, is left out.

    Args:
        finished: clock readings in seconds, oldest first.
        rounds_left: rounds still to come.

    Returns:
        Seconds, or `None` as long as there is nothing to go by.
    """
    if rounds_left <= 0:
        return 0.0
    if len(finished) < 2:
        return None
    return (finished[-1] - finished[0]) / (len(finished) - 1) * rounds_left


def describe_line(line: Mapping[str, Any]) -> list[str]:
    """Say a round's line in a few short phrases; what the line lacks is left out."""
    phrases = []
    if line.get("loss") is not None:
        phrases.append(f"loss {line['loss']:.3f}")
    score = read_validation(line.get("validation"))
    if score is not None:
        phrases.append(f"validation {score:.1%}")
    if line.get("unfit"):
        phrases.append(f"{len(line['unfit'])} not finite")
    if line.get("clients_per_second") is not None:
        phrases.append(f"{line['clients_per_second']:.1f} clients/s")
    return phrases


def read_validation(validation: Mapping[str, Any] | None) -> float | None:
    """The metric by which a run is judged, from the validation part of a round's line."""
    return (validation or {}).get((validation or {}).get("metric", "exact_match"))


def format_seconds(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class SilentProgress:
    """Shows nothing; keeps what it was told, for tests and notebooks."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[Mapping[str, Any]] = []

    def start(self, total_rounds: int, description: str, done: int = 0) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Keep the note in `notes`."""
        self.notes.append(text)

    def round(self, line: Mapping[str, Any]) -> None:
        """Keep the line in `lines`."""
        self.lines.append(line)

    def finish(self) -> None:
        """Nothing to end."""


@dataclass
class _Pace:
    """How far one run is: what both displays are drawn from."""

    total: int = 0
    done: int = 0
    description: str = ""
    finished: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        self.done = int(line.get("round", self.done + 1))
        self.finished.append(time.monotonic())
        score = read_validation(line.get("validation"))
        if score is not None:
            self.accuracies.append(score)
        self.phrases = describe_line(line)

    @property
    def left(self) -> str:
        seconds = estimate_seconds_left(self.finished, self.total - self.done)
        return "" if seconds is None else f"{format_seconds(seconds)} left"


class PlainProgress:
    """One line per round and per note, for output that nobody watches live."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()

    def start(self, total_rounds: int, description: str, done: int = 0) -> None:
        """Print what begins."""
        self.pace = _Pace(total_rounds, done, description)
        resumed = f", {done} of them done" if done else ""
        self._print(f"{description}: {total_rounds} rounds{resumed}")

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(text)

    def round(self, line: Mapping[str, Any]) -> None:
        """Print the round."""
        self.pace.add(line)
        phrases = [*self.pace.phrases, *([self.pace.left] if self.pace.left else [])]
        self._print(f"round {self.pace.done}/{self.pace.total}  {'  '.join(phrases)}")

    def finish(self) -> None:
        """Nothing to end."""

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """A bar that moves, the newest numbers beside it, and the course of validation accuracy as a sparkline."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()
        self.status = ""
        self.live: Live | None = None

    def start(self, total_rounds: int, description: str, done: int = 0) -> None:
        """Show an empty bar (or as full as the resumed run is)."""
        self.finish()
        self.pace = _Pace(total_rounds, done, description)
        self.status = ""
        # The display asks for itself anew at every refresh, so that the clock of the estimate runs on.
        self.live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4)
        self.live.start()

    def note(self, text: str) -> None:
        """Show the note under the bar until the next one; before the first bar, print it."""
        if self.live is None:
            self.console.print(Text(text, style="dim"))
            return
        self.status = text
        self.live.refresh()

    def round(self, line: Mapping[str, Any]) -> None:
        """Move the bar."""
        self.pace.add(line)
        self.status = ""
        if self.live is not None:
            self.live.refresh()

    def finish(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def render(self) -> Group:
        """Draw the present state: a bar line, and a line of numbers."""
        course = self.pace
        bar = Table.grid(padding=(0, 1))
        finished = course.total > 0 and course.done >= course.total
        bar.add_row(
            Text(course.description, style="bold"),
            ProgressBar(total=max(course.total, 1), completed=course.done, width=24, finished_style="green"),
            Text(f"round {course.done}/{course.total}"),
            Text("" if finished else course.left, style="cyan"),
        )
        phrases = list(course.phrases)
        if course.accuracies and not any(phrase.startswith("validation") for phrase in phrases):
            phrases.insert(1, f"validation {course.accuracies[-1]:.1%}")  # the newest there is, between evaluations
        numbers = Text("  ".join(phrases) or "the first round compiles", style="" if phrases else "dim")
        if len(course.accuracies) > 1:
            numbers.append("  " + draw_sparkline(course.accuracies), style="green")
        rows = [bar, numbers]
        if self.status:
            rows.append(Text(self.status, style="dim"))
        return Group(*rows)


def draw_sparkline(values: list[float], width: int = 24) -> str:
    """Draw the last `width` values as blocks between the smallest and the largest of them."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = high - low
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in shown)
