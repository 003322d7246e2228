"""Progress: what is shown where, and the estimate of the time left."""

import io

from rich.console import Console

from fedvlm_jax.runs.progress import (
    LiveProgress,
    PlainProgress,
    SilentProgress,
    draw_sparkline,
    estimate_seconds_left,
    format_seconds,
    open_progress,
)

LINE = {"round": 2, "loss": 1.23456, "validation": {"exact_match": 0.415}, "clients_per_second": 3.14}


def test_the_first_round_which_compiles_is_left_out_of_the_estimate() -> None:
    # The first round took until 100 s; the two after it two seconds each, so three more take six.
    assert estimate_seconds_left([100.0, 102.0, 104.0], 3) == 6.0
    assert estimate_seconds_left([100.0], 3) is None
    assert estimate_seconds_left([], 0) == 0.0


def test_plain_lines_where_nobody_watches() -> None:
    out = io.StringIO()
    show = open_progress(Console(file=out, width=200))
    assert isinstance(show, PlainProgress)
    show.start(4, "plora, seed 0", done=1)
    show.note("compiling [all]")
    show.round(LINE)
    show.round({"round": 3, "loss": 1.0, "validation": None})
    show.finish()
    lines = out.getvalue().splitlines()
    assert lines[0] == "plora, seed 0: 4 rounds, 1 of them done"
    assert lines[1] == "compiling [all]"
    assert lines[2] == "round 2/4  loss 1.235  validation 41.5%  3.1 clients/s"
    assert lines[3].startswith("round 3/4  loss 1.000  ")
    assert lines[3].endswith(" left")


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
    show.note("evaluating")
    with console.capture() as seen:
        console.print(show.render())
    assert "evaluating" in seen.get()
    assert "loss 1.000  validation 41.5%" in seen.get()
    show.finish()
    show.finish()
    assert show.live is None
    assert "reading data" in out.getvalue()


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
