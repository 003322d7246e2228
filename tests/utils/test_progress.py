"""Progress: what is shown where, and the estimate of the time left."""

import io

import pytest
from rich.console import Console

from fedvlm_jax.utils.progress import Numbered, SilentProgress, working
from fedvlm_jax.utils.progress_display import (
    LiveProgress,
    PlainProgress,
    draw_sparkline,
    estimate_seconds_left,
    format_seconds,
    open_progress,
)

LINE = {"round": 2, "loss": 1.23456, "validation": {"exact_match": 0.415}, "clients_per_second": 3.14}


def test_the_time_left_is_the_median_round_and_the_evaluations_at_what_they_cost() -> None:
    assert estimate_seconds_left([], 3, [], 0, 1) == (None, False)
    assert estimate_seconds_left([2.0, 90.0, 2.0], 3, [], 0, 0) == (6.0, True)  # one round waited for the disk
    assert estimate_seconds_left([2.0], 3, [], 0, 1) == (6.0, False)  # no evaluation yet: it is left out, and said
    # Four parts each, of which the first compiled: two evaluations take 2 x 4 x 0.5 s.
    assert estimate_seconds_left([2.0], 3, [60.0, 0.5, 0.5, 0.5], 4, 2) == (10.0, True)
    assert estimate_seconds_left([2.0], 0, [], 0, 1) == (0.0, True)


@pytest.mark.parametrize("every", [1, 4])
def test_the_time_left_does_not_jump_at_compiling_or_at_an_evaluation(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("fedvlm_jax.utils.progress_display.time.monotonic", lambda: now)
    show, rounds = PlainProgress(Console(file=io.StringIO())), 16
    show.start(rounds, "plora", evaluations=rounds // every)
    told = []
    for round_ in range(1, rounds + 1):
        if round_ == 1:
            with working(show, "compiling"):
                now += 300
        now += 2
        validated = round_ % every == 0
        if validated:
            with working(show, "validating"):
                show.advance(0, 10, "validation")
                for part in range(10):
                    now += 100 if round_ == every and not part else 1
                    show.advance(part + 1, 10, "validation")
        show.round({"round": round_, "seconds": 2.0, "validation": {"exact_match": 0.5} if validated else None})
        told.append(show.pace.left)
    exact = [2 * (rounds - n) + 10 * (rounds // every - n // every) for n in range(1, rounds + 1)]
    assert told[every - 1 :] == [f"{format_seconds(seconds)} left" for seconds in exact[every - 1 :]]
    assert all(text.endswith(" left, evaluation apart") for text in told[: every - 1])


def test_a_log_says_how_far_long_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = 0.0, io.StringIO()
    monkeypatch.setattr("fedvlm_jax.utils.progress_display.time.monotonic", lambda: now)
    show = PlainProgress(Console(file=out, width=200))
    with working(show, "attacking"):
        for part in range(8):
            now += 12
            show.advance(part + 1, 8, "clients")
    assert out.getvalue().splitlines() == [
        "attacking", "  3 of 8 clients", "  6 of 8 clients", "  done in 1:36"
    ]  # fmt: skip


def test_plain_lines_where_nobody_watches() -> None:
    out = io.StringIO()
    show = open_progress(Console(file=out, width=200))
    assert isinstance(show, PlainProgress)
    show.start(4, "plora, seed 0", done=1)
    show.note("compiling [all]")
    show.round(LINE)
    show.round({"round": 3, "loss": 1.0, "validation": None, "seconds": 61.0})
    show.finish()
    lines = out.getvalue().splitlines()
    assert lines[0] == "plora, seed 0: 4 rounds, 1 of them done"
    assert lines[1] == "compiling [all]"
    assert lines[2] == "round 2/4  loss 1.235  validation 41.5%  3.1 clients/s"
    assert lines[3].startswith("round 3/4  loss 1.000  ")
    assert lines[3].endswith("  1:01 left")


def test_the_live_display_shows_bar_numbers_and_course() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    show = open_progress(console)
    assert isinstance(show, LiveProgress)
    show.note("reading data")
    show.start(3, "plora")
    show.round({**LINE, "round": 1, "validation": {"exact_match": 0.2}})
    show.round(LINE)
    with console.capture() as seen:
        console.print(show.render())
    assert "round 2/3" in seen.get()
    assert "loss 1.235  validation 41.5%  3.1 clients/s  ▁█" in seen.get()
    show.round({"round": 3, "loss": 1.0, "validation": None})
    with console.capture() as seen:
        console.print(show.render())
    assert "loss 1.000  validation 41.5%" in seen.get()
    with console.capture() as seen:
        show.note("noto-en is not finite")
    assert "noto-en is not finite" in seen.get(), "above the bar, and not drawn over by the next round"
    show.finish()
    show.finish()
    assert show.live is None
    assert "reading data" in out.getvalue()


def test_what_is_no_round_has_a_clock_and_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fedvlm_jax.utils.progress_display.time.monotonic", lambda: now)
    out = io.StringIO()
    show = LiveProgress(Console(file=out, width=120, force_terminal=True, color_system=None))

    def draw() -> str:
        paper = io.StringIO()
        Console(file=paper, width=120).print(show.render())
        return paper.getvalue()

    with working(show, "compiling"):
        now = 65
        assert draw() == "compiling  1:05\n"
    assert show.live is None
    assert "compiling (1:05)" in out.getvalue()
    Numbered(show, 3, 20).start(4, "plora")
    with working(show, "validating"):
        show.advance(3, 7, "test")
        now = 70
        assert "run 3 of 20 · plora" in draw()
        assert draw().splitlines()[-1].split() == ["validating:", "test", "━" * 10, "3/7", "0:05"]
    assert "validating" not in draw()
    show.finish()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert isinstance(open_progress(Console(file=io.StringIO(), force_terminal=True)), PlainProgress)


def test_the_silent_one_keeps_what_it_was_told() -> None:
    show = SilentProgress()
    show.start(1, "x")
    show.note("n")
    show.round(LINE)
    show.finish()
    assert (show.notes, show.lines) == (["n"], [LINE])


def test_small_drawings() -> None:
    assert draw_sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert draw_sparkline([0.3, 0.3]) == "▁▁"
    assert [format_seconds(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
