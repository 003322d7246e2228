"""The figures of a run.

All scores are of the metric by which a run is judged, on test unless the figure says validation, in per cent.
"""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_clients import gain_by_client
from fedvlm_jax.evaluation.statistics.over_seeds import estimate_mean
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.cross_client_heatmap import draw_matrix
from fedvlm_jax.reporting.figures.round_lines import lift_validation, pick
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.run_dir.reader import RunRecord


def draw_run(record: RunRecord, target: Path, prefix: str = "") -> list[theme.Picture]:
    """Draw and save a run's clients, their gains, the cross-client matrix and the rounds, as far as it has them."""
    drawn = {"clients": draw_clients(record)}
    if set(record.scores("zero_shot")) & set(record.scores("personal")):
        drawn["gains"] = draw_gains(record)
    if record.metric in (record.results.get("cross_clients") or {}):
        drawn["matrix"] = draw_matrix(record)
    if record.rounds:
        drawn["rounds"] = draw_rounds(record)
    captions, label = theme.CAPTIONS["run"], find_measure(record.metric).label
    return [
        theme.save_picture(figure, target, prefix + name, captions[name].format(label=label))
        for name, figure in drawn.items()
    ]


@theme.style()
def draw_clients(record: RunRecord) -> Figure:
    """Draw every client's way from zero-shot to its personal model, best client on top."""
    zero_shot, personal = record.scores("zero_shot"), record.scores("personal")
    order = sorted(personal, key=lambda client: personal[client])
    figure, ax, rows, size = _make_rows(order, 1.1, 0.23)
    ends = 100 * np.asarray([personal[client] for client in order])
    starts = 100 * np.asarray([zero_shot.get(client, np.nan) for client in order])
    colour = _colour(record)
    ax.hlines(rows, starts, ends, color=theme.GRID, linewidth=0.07 * size, zorder=1)
    ring = {"facecolors": theme.PAPER, "edgecolors": theme.MUTED, "linewidths": 1.3}
    ax.scatter(starts, rows, s=size, zorder=2, clip_on=False, **ring)
    ax.scatter(ends, rows, s=size, color=colour, zorder=3, clip_on=False)
    means = sorted([(float(np.nanmean(starts)), theme.MUTED, "zero-shot"), (float(ends.mean()), colour, "personal")])
    # The lower mean's label stands to its left and the higher one's to its right: close means stay readable.
    frame = ("data", "axes fraction")
    for (mean, shade, name), align, shift in zip(means, ("right", "left"), (-3, 3), strict=True):
        ax.axvline(mean, color=shade, linewidth=1, linestyle=theme.LEVEL, zorder=0)
        theme.annotate(ax, (mean, 1), f"{name} {mean:.1f}", frame, (shift, 3), align, color=shade, weight="bold")
    ax.set_xlabel(f"{find_measure(record.metric).label} on test, %")
    ax.set_xlim(left=max(0.0, min(np.nanmin(starts), ends.min()) - 3))
    return figure


@theme.style()
def draw_gains(record: RunRecord) -> Figure:
    """Draw what every client gains over the frozen model, with the mean and its t-interval over clients."""
    zero_shot, personal = record.scores("zero_shot"), record.scores("personal")
    gains = dict(sorted(gain_by_client(personal, zero_shot).items(), key=itemgetter(1)))
    order, values, gain = list(gains), 100 * np.asarray(list(gains.values())), estimate_mean({0: gains})
    figure, ax, rows, size = _make_rows(order, 1.2, 0.2)
    colour = _colour(record)
    ax.hlines(rows, 0, values, color=theme.GRID, linewidth=0.07 * size, zorder=1)
    intervals = (record.results.get("gain_intervals") or {}).get(record.metric) or {}
    if intervals and len(order) <= theme.LABELLED:  # among more clients they would hide each other
        known = [row for row, client in enumerate(order) if client in intervals]
        ends = 100 * np.asarray([intervals[order[row]] for row in known]).reshape(-1, 2)
        ax.hlines(known, ends[:, 0], ends[:, 1], color=colour, linewidth=1, zorder=2)
    # A client that loses is a square: its side of the line is not the only sign of it.
    for chosen, marker in ((values >= 0, "o"), (values < 0, "s")):
        ax.scatter(values[chosen], rows[chosen], s=size, color=colour, marker=marker, zorder=3)
    ax.axvline(0, color=theme.MUTED, linewidth=1)
    ax.axvline(100 * gain.mean, color=colour, linewidth=1, linestyle=theme.LEVEL, zorder=0)
    label = f"mean {points(gain.mean)}"
    if np.isfinite(gain.low):
        ax.axvspan(100 * gain.low, 100 * gain.high, color=colour, alpha=0.14, linewidth=0, zorder=0)
        label += f" [{points(gain.low)}, {points(gain.high)}]"
    theme.annotate(ax, (100 * gain.mean, 1), label, ("data", "axes fraction"), (0, 3), "center", color=colour)
    ax.set_xlabel(f"{find_measure(record.metric).label} on test, points gained over zero-shot")
    return figure


@theme.style()
def draw_rounds(record: RunRecord) -> Figure:
    """Draw validation accuracy and training loss over the rounds."""
    figure, (left, right) = theme.make_figure(theme.WIDE, 2.9, columns=2)
    colour = _colour(record)
    lines = lift_validation(record.rounds, record.metric)
    rounds, values = pick(lines, "validation", 100)
    left.plot(rounds, values, color=colour, marker="o", markersize=4, linewidth=1.8)
    left.plot(*pick(lines, "before", 100), color=theme.MUTED, linewidth=1.2, linestyle=theme.BEFORE)
    if start := record.scores("zero_shot", split="validation"):
        level = 100 * float(np.mean(list(start.values())))
        left.axhline(level, color=theme.MUTED, linewidth=1, linestyle=theme.DOTTED)
        theme.annotate(left, (1, level), "zero-shot", ("axes fraction", "data"), (0, 3), "right", color=theme.MUTED)
    chosen = record.results.get("selected_round")
    if chosen in rounds:
        left.plot(chosen, values[rounds.index(chosen)], "o", markersize=10, fillstyle="none", color=colour)
    left.set_title(f"Validation {find_measure(record.metric).label}, %")
    right.plot(*pick(lines, "loss"), color=colour, linewidth=1.8)
    right.set_title("Training loss")
    for ax in (left, right):
        ax.grid(axis="y")
        ax.grid(visible=False, axis="x")
        ax.set_xlabel("round")
        theme.use_whole_numbers(ax)
    return figure


def _colour(record: RunRecord) -> str:
    return theme.SERIES[theme.choose_series([record.method])[record.method]]


def _make_rows(order: Sequence[str], margin: float, row: float) -> tuple[Figure, Any, np.ndarray, int]:
    """Make a figure of a row per client: its axes, the rows, and the area of a marker in square points."""
    named = len(order) <= theme.LABELLED
    figure, (ax,) = theme.make_figure(theme.WIDE, margin + (row * len(order) if named else min(6.0, 0.05 * len(order))))
    theme.name_rows(ax, order if named else [])
    ax.set(ylabel="" if named else f"{format_count(len(order), 'client')}, sorted", ylim=(-0.8, len(order) - 0.2))
    return figure, ax, np.arange(len(order)), 34 if named else 8
