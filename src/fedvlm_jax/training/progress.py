"""What a person sees while a run goes on: live bars on a terminal, plain lines in a log, nothing in a test.

A run reports to a `Progress` and does not know which one it is. The lines that `round` takes are those of
`metrics.jsonl`; what is no round (compiling, evaluating) is a piece of work with a clock of its own, and a bar where
its parts are known.
"""

import statistics
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedvlm_jax.utils.console import open_console
from fedvlm_jax.utils.untrusted_text import clean

SPARKS = "▁▂▃▄▅▆▇█"

COMPILING = "compiling the round: about a minute the first time, seconds where it is kept from an earlier run"
"""The shipped model's takes 15 s on two quiet cores; Florence-2-base's a minute, on a busy machine more."""


class Progress(Protocol):
    """Where a run reports how far it is."""

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Begin a run of `total_rounds` rounds, of which `done` are finished already (a resumed run).

        Args:
            total_rounds: rounds in all.
            description: whose they are.
            done: rounds that are finished.
            evaluations: how often models are validated between the rounds that are left.
        """
        ...

    def note(self, text: str) -> None:
        """Tell something that is no round: what is loaded, found, written."""
        ...

    def begin(self, text: str) -> None:
        """Begin a piece of work that is no round and takes time; `working` ends it in any case."""
        ...

    def advance(self, done: int, total: int, what: str = "") -> None:
        """So many parts of the piece of work are done, of so many; `what` they are part of, where there are several."""
        ...

    def end(self) -> None:
        """End the piece of work."""
        ...

    def round(self, line: Mapping[str, Any]) -> None:
        """Report a finished round."""
        ...

    def finish(self) -> None:
        """End the run, however it ended; may be called more than once."""
        ...


@contextmanager
def working(show: Progress, text: str) -> Generator[None]:
    """Show a piece of work with a running clock while the block lasts."""
    show.begin(text)
    try:
        yield
    finally:
        show.end()


def open_progress(console: Console | None = None) -> Progress:
    """Return the live display on a terminal and plain lines elsewhere (a pipe, a log file, CI, TERM=dumb)."""
    console = console or open_console(stderr=True)
    moves = console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(console) if moves else PlainProgress(console)


def estimate_seconds_left(
    rounds: list[float], rounds_left: int, parts: list[float], parts_each: int, evaluations_left: int
) -> tuple[float | None, bool]:
    """Estimate the time left from what rounds, and parts of an evaluation, took; one that compiled counts as one.

    Args:
        rounds: seconds of each finished round, without compiling and evaluation.
        rounds_left: rounds still to come.
        parts: seconds of each finished part of the evaluations between rounds.
        parts_each: parts of one evaluation.
        evaluations_left: evaluations still to come.

    Returns:
        Seconds, `None` as long as there is nothing to go by, and whether evaluations are among them.
    """
    if rounds_left <= 0:
        return 0.0, True
    if not rounds:
        return None, False
    seconds = statistics.median(rounds) * rounds_left
    if evaluations_left <= 0:
        return seconds, True
    if not parts_each:
        return seconds, False
    return seconds + statistics.median(parts) * parts_each * evaluations_left, True


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

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Keep the note in `notes`."""
        self.notes.append(text)

    def begin(self, text: str) -> None:
        """Keep what begins in `notes`."""
        self.note(text)

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Nothing to show."""

    def end(self) -> None:
        """Nothing to show."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Keep the line in `lines`."""
        self.lines.append(line)

    def finish(self) -> None:
        """Nothing to end."""


class Numbered:
    """Another progress, told which of several runs this is: "run 3 of 20"."""

    def __init__(self, show: Progress, number: int, total: int) -> None:
        self.show, self.which = show, f"run {number} of {total}"
        self.note, self.begin, self.advance, self.end = show.note, show.begin, show.advance, show.end
        self.round, self.finish = show.round, show.finish

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Begin, with the number before the description."""
        self.show.start(total_rounds, f"{self.which} · {description}", done, evaluations)


@dataclass
class _Work:
    """A piece of work that is no round."""

    text: str
    began: float = field(default_factory=lambda: time.monotonic())
    what: str = ""
    done: int = 0
    total: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@dataclass
class _Pace:
    """How far one run is: what both displays are drawn from."""

    total: int = 0
    done: int = 0
    description: str = ""
    evaluations: int = 0
    seconds: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)
    parts_each: int = 0
    parts_of_work: int = 0
    accuracies: list[float] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    last: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        self.done = int(line.get("round", self.done + 1))
        if line.get("seconds") is not None:
            self.seconds.append(line["seconds"])
        if line.get("validation") is not None:
            self.evaluations -= 1
            self.parts_each = self.parts_of_work
        score = read_validation(line.get("validation"))
        if score is not None:
            self.accuracies.append(score)
        self.phrases = describe_line(line)

    def time_part(self, done: int) -> None:
        """Note how long a part of an evaluation took; `done` 0 starts the clock."""
        now = time.monotonic()
        if done:
            self.parts.append(now - self.last)
            self.parts_of_work += 1
        self.last = now

    @property
    def left(self) -> str:
        left = self.total - self.done
        seconds, whole = estimate_seconds_left(self.seconds, left, self.parts, self.parts_each, self.evaluations)
        if seconds is None:
            return ""
        return f"{format_seconds(seconds)} left" + ("" if whole else ", evaluation apart")


class PlainProgress:
    """One line per round and per note, for output that nobody watches live."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()
        self.work: _Work | None = None

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Print what begins."""
        self.pace = _Pace(total_rounds, done, description, evaluations)
        resumed = f", {done} of them done" if done else ""
        self._print(f"{description}: {total_rounds} rounds{resumed}")

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(text)

    def begin(self, text: str) -> None:
        """Print what begins."""
        self.work, self.pace.parts_of_work = _Work(text), 0
        self._print(text)

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Nothing to print; the time that it took goes into the estimate."""
        self.pace.time_part(done)

    def end(self) -> None:
        """Say how long it took, where one had to wait."""
        if self.work is not None and self.work.seconds >= LONG:
            self._print(f"  done in {format_seconds(self.work.seconds)}")
        self.work = None

    def round(self, line: Mapping[str, Any]) -> None:
        """Print the round."""
        self.pace.add(line)
        phrases = [*self.pace.phrases, *([self.pace.left] if self.pace.left else [])]
        self._print(f"round {self.pace.done}/{self.pace.total}  {'  '.join(phrases)}")

    def finish(self) -> None:
        """Nothing to end."""

    def _print(self, text: str) -> None:
        self.console.print(clean(text), markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """A bar that moves, the newest numbers beside it, the course of validation accuracy, and what else is at work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()
        self.work: _Work | None = None
        self.live: Live | None = None

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Show an empty bar (or as full as the resumed run is)."""
        self.finish()
        self.pace = _Pace(total_rounds, done, description, evaluations)
        self._open()

    def note(self, text: str) -> None:
        """Print the note; above the bar, where there is one, so that it is still there when the run has ended."""
        self.console.print(Text(clean(text), style="dim"))

    def begin(self, text: str) -> None:
        """Show what begins, with a clock."""
        self.work, self.pace.parts_of_work = _Work(text), 0
        self._open()

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Move the bar of the piece of work."""
        self.pace.time_part(done)
        if self.work is not None:
            self.work.done, self.work.total, self.work.what = done, total, what

    def end(self) -> None:
        """Take the piece of work away; before the first round, leave a line that says how long it took."""
        work, self.work = self.work, None
        if self.pace.total or work is None:
            return
        self.finish()
        if work.seconds >= LONG:
            self.console.print(Text(f"{work.text} ({format_seconds(work.seconds)})", style="dim"))

    def round(self, line: Mapping[str, Any]) -> None:
        """Move the bar."""
        self.pace.add(line)
        if self.live is not None:
            self.live.refresh()

    def finish(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        self.pace = _Pace()

    def _open(self) -> None:
        """Draw from now on; the display asks for itself anew at every refresh, so that clocks run on."""
        if self.live is None:
            # Without rounds there is nothing that should stay on the screen.
            self.live = Live(
                console=self.console,
                get_renderable=self.render,
                refresh_per_second=4,
                transient=not self.pace.total,
            )
            self.live.start()
        self.live.refresh()

    def render(self) -> Group:
        """Draw the present state: a bar line and a line of numbers, and a line of what else is at work."""
        return Group(*self._draw_rounds(), *self._draw_work())

    def _draw_rounds(self) -> list[Table | Text]:
        course = self.pace
        if not course.total:
            return []
        bar = Table.grid(padding=(0, 1))
        finished = course.done >= course.total
        bar.add_row(
            Text(course.description, style="bold"),
            ProgressBar(total=course.total, completed=course.done, width=24, finished_style="green"),
            Text(f"round {course.done}/{course.total}"),
            Text("" if finished else course.left, style="cyan"),
        )
        phrases = list(course.phrases)
        if course.accuracies and not any(phrase.startswith("validation") for phrase in phrases):
            phrases.insert(1, f"validation {course.accuracies[-1]:.1%}")  # the newest there is, between evaluations
        numbers = Text("  ".join(phrases))
        if len(course.accuracies) > 1:
            numbers.append("  " + draw_sparkline(course.accuracies), style="green")
        return [bar, numbers] if numbers else [bar]

    def _draw_work(self) -> list[Table | Text]:
        work = self.work
        if work is None:
            return []
        text = clean(f"{work.text}: {work.what}" if work.what else work.text)
        clock = Text(format_seconds(work.seconds), style="cyan")
        if not work.total:
            return [Text(text + "  ", style="dim") + clock]
        bar = Table.grid(padding=(0, 1))
        drawn = ProgressBar(total=work.total, completed=work.done, width=24)
        bar.add_row(Text(text, style="dim"), drawn, Text(f"{work.done}/{work.total}"), clock)
        return [bar]


LONG = 2.0
"""Seconds after which it is told how long a piece of work took."""


def draw_sparkline(values: list[float], width: int = 24) -> str:
    """Draw the last `width` values as blocks between the smallest and the largest of them."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = high - low
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in shown)
