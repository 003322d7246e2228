"""Display of a run while it goes on: live bars on a terminal, plain lines in a log, nothing in a test.

A run reports to a `Progress` and does not know which it is. The lines that `round` takes are those of `metrics.jsonl`;
what is no round (compiling, evaluating) is a piece of work with its own clock, and a bar where its parts are known.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedvlm_jax.errors import format_count
from fedvlm_jax.utils.console import Terminal
from fedvlm_jax.utils.progress import Progress
from fedvlm_jax.utils.untrusted_text import clean

SPARKS = "▁▂▃▄▅▆▇█"

LONG = 2.0
"""Seconds after which it is reported how long a piece of work took."""
WHILE = 30.0
"""Seconds between lines in a log about the same piece of work."""


def open_progress(console: Console | None = None) -> Progress:
    """Return the live display on a terminal and plain lines elsewhere (a pipe, a log file, CI, TERM=dumb)."""
    console = console or Terminal(stderr=True)
    moves = console.is_terminal and not console.is_dumb_terminal  # a dumb one cannot move its cursor
    return LiveProgress(console) if moves else PlainProgress(console)


def estimate_seconds_left(
    rounds: list[float], rounds_left: int, parts: list[float], parts_each: int, evaluations_left: int
) -> tuple[float | None, bool]:
    """Estimate the time left from the median round, and part of an evaluation: compiling weighs little in it.

    >>> estimate_seconds_left(rounds=[2.0], rounds_left=3, parts=[0.5], parts_each=4, evaluations_left=2)
    (10.0, True)

    Args:
        rounds, parts: seconds of each finished round, compiling and evaluation apart, and of parts of evaluations.
        parts_each: parts of one evaluation; 0 before the first.
        rounds_left, evaluations_left: still to come.

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
    """Say a round's line in a few short phrases; what the line lacks is left out.

    >>> describe_line({"loss": 1.23456, "epsilon_bound": 2.5, "unfit": ["a"]})
    ['loss 1.235', 'ε below 2.5', '1 not finite']
    """
    phrases = []
    if line.get("loss") is not None:
        phrases.append(f"loss {line['loss']:.3f}")
    score = _read_score(line)
    if score is not None:
        phrases.append(f"validation {score:.1%}")
    if line.get("epsilon") is not None:
        phrases.append(f"ε {line['epsilon']:.3g}")
    elif line.get("epsilon_bound") is not None:
        phrases.append(f"ε below {line['epsilon_bound']:.3g}")
    if line.get("unfit"):
        phrases.append(f"{len(line['unfit'])} not finite")
    if line.get("clients_per_second") is not None:
        phrases.append(f"{line['clients_per_second']:.1f} clients/s")
    return phrases


def _read_score(line: Mapping[str, Any]) -> float | None:
    """Return the metric by which a run is judged, where the round was validated.

    >>> _read_score({"validation": {"metric": "token_f1", "token_f1": 0.5}})
    0.5
    """
    validation = line.get("validation") or {}
    return validation.get(validation.get("metric", "exact_match"))


def format_seconds(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss.

    >>> format_seconds(65), format_seconds(3725)
    ('1:05', '1:02:05')
    """
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def draw_sparkline(values: list[float], width: int = 24) -> str:
    """Draw the last `width` values as blocks between the smallest and the largest of them.

    >>> draw_sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    shown = values[-width:]
    low, span = min(shown), max(shown) - min(shown)
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in shown)


@dataclass
class _Work:
    """A piece of work that is no round."""

    text: str
    began: float = field(default_factory=lambda: time.monotonic())
    what: str = ""
    done: int = 0
    total: int = 0
    told: float = 0.0  # seconds after which it was last printed how far it is

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@dataclass
class _Pace:
    """The state of one run, which both displays are drawn from."""

    total: int = 0
    done: int = 0
    description: str = ""
    evaluations: int = 0
    seconds: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)
    parts_each: int = 0
    parts_of_work: int = 0
    scores: list[float] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    last: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        self.done = int(line.get("round", self.done + 1))
        if line.get("seconds") is not None:
            self.seconds.append(line["seconds"])
        if line.get("validation") is not None:
            self.evaluations -= 1
            self.parts_each = self.parts_of_work  # known once the first evaluation is done
        score = _read_score(line)
        if score is not None:
            self.scores.append(score)
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
        rounds_left = self.total - self.done
        seconds, whole = estimate_seconds_left(self.seconds, rounds_left, self.parts, self.parts_each, self.evaluations)
        if seconds is None:
            return ""
        return f"{format_seconds(seconds)} left" + ("" if whole else ", evaluation apart")


class _Display(Progress):
    """A progress that knows its pace."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()
        self.work: _Work | None = None

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        self.pace = _Pace(total_rounds, done, description, evaluations)

    def begin(self, text: str) -> None:
        self.work, self.pace.parts_of_work = _Work(text), 0

    def advance(self, done: int, total: int, what: str = "") -> None:
        self.pace.time_part(done)
        if self.work is not None:
            self.work.done, self.work.total, self.work.what = done, total, what

    def round(self, line: Mapping[str, Any]) -> None:
        self.pace.add(line)


class PlainProgress(_Display):
    """One line per round and per note, for output that nobody watches live; of long work a line in a while."""

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Print what begins."""
        super().start(total_rounds, description, done, evaluations)
        self.note(f"{description}: {format_count(total_rounds, 'round')}" + (f", {done} of them done" if done else ""))

    def note(self, text: str) -> None:
        """Print the note."""
        self.console.print(clean(text), markup=False, highlight=False, soft_wrap=True)

    def begin(self, text: str) -> None:
        """Print what begins."""
        super().begin(text)
        self.note(text)

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Print how far it is where nothing was printed for a while."""
        super().advance(done, total, what)
        work = self.work
        if work is not None and done < total and work.seconds - work.told >= WHILE:
            work.told = work.seconds
            self.note(f"  {done} of {total} {what}".rstrip())

    def end(self) -> None:
        """Say how long it took, where one had to wait."""
        if self.work is not None and self.work.seconds >= LONG:
            self.note(f"  done in {format_seconds(self.work.seconds)}")
        self.work = None

    def round(self, line: Mapping[str, Any]) -> None:
        """Print the round."""
        super().round(line)
        phrases = [*self.pace.phrases, *([self.pace.left] if self.pace.left else [])]
        self.note(f"round {self.pace.done}/{self.pace.total}  {'  '.join(phrases)}")


class LiveProgress(_Display):
    """A bar that moves, the newest numbers beside it, the course of validation scores, and what else is at work."""

    live: Live | None = None

    def start(self, total_rounds: int, description: str, done: int = 0, evaluations: int = 0) -> None:
        """Show an empty bar (or as full as the resumed run is)."""
        self.finish()
        super().start(total_rounds, description, done, evaluations)
        self._draw()

    def note(self, text: str) -> None:
        """Print the note above the bar, so that it is still there when the run has ended."""
        self.console.print(Text(clean(text), style="dim"))

    def begin(self, text: str) -> None:
        """Show what begins, with a clock."""
        super().begin(text)
        self._draw()

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
        super().round(line)
        if self.live is not None:
            self.live.refresh()

    def finish(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        self.pace = _Pace()

    def _draw(self) -> None:
        """Draw from now on; the display asks for itself anew at every refresh, so that clocks run on."""
        if self.live is None:
            # Without rounds there is nothing that should stay on the screen.
            gone = not self.pace.total
            self.live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4, transient=gone)
            self.live.start()
        self.live.refresh()

    def render(self) -> Group:
        """Draw the present state: a bar line and a line of numbers, and a line of what else is at work."""
        return Group(*self._draw_rounds(), *self._draw_work())

    def _draw_rounds(self) -> list[Table | Text]:
        pace = self.pace
        if not pace.total:
            return []
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(pace.description, style="bold"),
            ProgressBar(total=pace.total, completed=pace.done, width=24, finished_style="green"),
            Text(f"round {pace.done}/{pace.total}"),
            Text("" if pace.done >= pace.total else pace.left, style="cyan"),
        )
        phrases = list(pace.phrases)
        if pace.scores and not any(phrase.startswith("validation") for phrase in phrases):
            phrases.insert(1, f"validation {pace.scores[-1]:.1%}")  # the newest score, between evaluations
        numbers = Text("  ".join(phrases))
        if len(pace.scores) > 1:
            numbers.append("  " + draw_sparkline(pace.scores), style="green")
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
