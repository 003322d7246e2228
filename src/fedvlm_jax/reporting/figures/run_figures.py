"""The pictures of a run. Each function draws one picture, wide or narrow (for a phone), in a theme.

All scores are of the metric by which a run is judged, on test unless the picture says validation, in per cent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_clients import gain_by_client, summarise_gain
from fedvlm_jax.reporting.figures.fonts import fit_name
from fedvlm_jax.reporting.figures.theme import BEFORE, Theme, choose_series, make_figure, use_whole_numbers
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.training.run_dir.reader import RunRecord

__all__ = [
    "LABELLED",
    "NARROW",
    "WIDE",
    "annotate",
    "draw_clients",
    "draw_gains",
    "draw_rounds",
    "name_rows",
    "read_validation",
]

WIDE, NARROW = 7.6, 3.7
LABELLED = 48
"""Above so many clients their names are left out of pictures."""


def draw_clients(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw every client's way from zero-shot to its personal model, best client on top."""
    zero_shot, personal = record.scores("zero_shot"), record.scores("personal")
    order = sorted(personal, key=lambda client: personal[client])
    named = len(order) <= LABELLED
    rows = np.arange(len(order))
    ends = 100 * np.asarray([personal[client] for client in order])
    starts = 100 * np.asarray([zero_shot.get(client, np.nan) for client in order])
    height = 1.1 + (0.23 * len(order) if named else min(6.0, 0.05 * len(order)))
    figure, (ax,) = make_figure(theme, NARROW if narrow else WIDE, height)
    colour = theme.series[choose_series([record.method])[record.method]]
    size = 36 if named else 8
    ax.hlines(rows, starts, ends, color=theme.grid, linewidth=2.5 if named else 0.8, zorder=1)
    ax.scatter(
        starts, rows, s=size, facecolors=theme.paper, edgecolors=theme.muted, linewidths=1.3, zorder=2, clip_on=False
    )
    ax.scatter(ends, rows, s=size, color=colour, zorder=3, clip_on=False)
    means = sorted([(float(np.nanmean(starts)), theme.muted, "zero-shot"), (float(ends.mean()), colour, "personal")])
    # The lower mean's label stands to its left and the higher one's to its right: close means stay readable.
    for (mean, shade, name), align, shift in zip(means, ("right", "left"), (-3, 3), strict=True):
        ax.axvline(mean, color=shade, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        label = {"ha": align, "color": shade, "fontsize": 9, "fontweight": "bold", "textcoords": "offset points"}
        ax.annotate(f"{name} {mean:.1f}", (mean, 1), xycoords=("data", "axes fraction"), xytext=(shift, 3), **label)
    name_rows(ax, order if named else [])
    ax.set_ylabel("" if named else f"{len(order)} clients, sorted")
    ax.set_ylim(-0.8, len(order) - 0.2)
    ax.set_xlabel(f"{find_measure(record.metric).label} on test, %")
    ax.set_xlim(left=max(0.0, min(np.nanmin(starts), ends.min()) - 3))
    return figure


def draw_gains(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw what every client gains over the frozen model, with the mean and its bootstrap interval over clients."""
    zero_shot, personal = record.scores("zero_shot"), record.scores("personal")
    gains = gain_by_client(personal, zero_shot)
    order = sorted(gains, key=gains.__getitem__)
    named = len(order) <= LABELLED
    values, rows = 100 * np.asarray([gains[client] for client in order]), np.arange(len(order))
    height = 1.2 + (0.2 * len(order) if named else min(6.0, 0.05 * len(order)))
    figure, (ax,) = make_figure(theme, NARROW if narrow else WIDE, height)
    colour = theme.series[choose_series([record.method])[record.method]]
    gain = summarise_gain({client: personal[client] for client in order}, zero_shot)
    ax.hlines(rows, 0, values, color=theme.grid, linewidth=2.5 if named else 0.8, zorder=1)
    intervals = (record.results.get("gain_intervals") or {}).get(record.metric) or {}
    if named and intervals:  # among more clients than have names they would hide each other
        there = [row for row, client in enumerate(order) if client in intervals]
        ends = 100 * np.asarray([intervals[order[row]] for row in there]).reshape(-1, 2)
        ax.hlines(there, ends[:, 0], ends[:, 1], color=colour, linewidth=1, zorder=2)
    # What loses is a square: its side of the line is not the only sign of it.
    for chosen, marker in ((values >= 0, "o"), (values < 0, "s")):
        ax.scatter(values[chosen], rows[chosen], s=32 if named else 8, color=colour, marker=marker, zorder=3)
    ax.axvline(0, color=theme.muted, linewidth=1)
    ax.axvline(100 * gain.mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    if np.isfinite(gain.low):
        ax.axvspan(100 * gain.low, 100 * gain.high, color=colour, alpha=0.14, linewidth=0, zorder=0)
    label = f"mean {points(gain.mean)}" + (
        f" [{points(gain.low)}, {points(gain.high)}]" if np.isfinite(gain.low) else ""
    )
    annotate(ax, (100 * gain.mean, 1), label, colour, ("data", "axes fraction"), (0, 3), "center")
    name_rows(ax, order if named else [])
    ax.set_ylabel("" if named else f"{len(order)} clients, sorted")
    ax.set_ylim(-0.8, len(order) - 0.2)
    gap = "\n" if narrow else " "
    ax.set_xlabel(f"{find_measure(record.metric).label} on test,{gap}points gained over zero-shot")
    return figure


def draw_rounds(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw validation accuracy and training loss over the rounds."""
    width, height = (NARROW, 4.6) if narrow else (WIDE, 2.9)
    figure, (left, right) = make_figure(theme, width, height, columns=1 if narrow else 2, rows=2 if narrow else 1)
    colour = theme.series[choose_series([record.method])[record.method]]
    rounds, values = read_validation(record.rounds, record.metric)
    left.plot(rounds, values, color=colour, marker="o", markersize=4, linewidth=1.8)
    before = [
        (line["round"], 100 * line["validation"]["before_redistribution"][record.metric])
        for line in record.rounds
        if ((line.get("validation") or {}).get("before_redistribution") or {}).get(record.metric) is not None
    ]
    if before:
        left.plot(*zip(*before, strict=True), color=theme.muted, linewidth=1.2, linestyle=BEFORE)
    start = record.scores("zero_shot", split="validation")
    if start:
        level = 100 * float(np.mean(list(start.values())))
        left.axhline(level, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)))
        annotate(left, (1, level), "zero-shot", theme.muted, ("axes fraction", "data"), (0, 3), "right")
    chosen = record.results.get("selected_round")
    if chosen in rounds:
        left.plot(chosen, values[rounds.index(chosen)], "o", markersize=10, fillstyle="none", color=colour)
    left.set_title(f"Validation {find_measure(record.metric).label}, %", fontsize=10, loc="left", color=theme.ink)
    losses = [(line["round"], line["loss"]) for line in record.rounds if line.get("loss") is not None]
    if losses:
        right.plot(*zip(*losses, strict=True), color=colour, linewidth=1.8)
    right.set_title("Training loss", fontsize=10, loc="left", color=theme.ink)
    for ax in (left, right):
        ax.grid(axis="y", color=theme.grid, linewidth=0.8)
        ax.grid(visible=False, axis="x")
        ax.set_xlabel("round")
        use_whole_numbers(ax)
    return figure


def read_validation(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Pick the rounds that were evaluated, and their validation metrics in per cent."""
    points = [
        (line["round"], 100 * line["validation"][metric])
        for line in lines
        if (line.get("validation") or {}).get(metric) is not None
    ]
    return [number for number, _ in points], [value for _, value in points]


def name_rows(ax: Any, names: Sequence[str]) -> None:
    """Write names beside the rows, in two fifths of the picture at most: a dollar sign in one starts no formula."""
    width = int(5.5 * ax.figure.get_figwidth())
    ax.set_yticks(range(len(names)), [fit_name(name, width) for name in names], parse_math=False)


def annotate(
    ax: Any,
    at: tuple[float, float],
    text: str,
    colour: str,
    frame: Any,
    shift: tuple[int, int],
    align: str,
    size: float = 9,
) -> None:
    """Write a text beside a place; `frame` says in which coordinates, `shift` is in points."""
    ax.annotate(
        text, at, xycoords=frame, xytext=shift, textcoords="offset points", ha=align, color=colour, fontsize=size
    )
