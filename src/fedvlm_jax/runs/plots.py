"""The pictures of runs and comparisons. Each function draws one picture, wide or narrow (for a phone), in a theme.

All scores are of the metric by which a run is judged, on test unless the picture says validation, in per cent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.runs.folders import ComparisonRecord, RunRecord, read_metrics
from fedvlm_jax.runs.measures import find_measure
from fedvlm_jax.runs.statistics import compare_paired, mean_over_seeds
from fedvlm_jax.runs.tables import points
from fedvlm_jax.runs.theme import MARKERS, Theme, choose_series, make_figure

__all__ = [
    "LABELLED",
    "NARROW",
    "WIDE",
    "Curves",
    "draw_clients",
    "draw_curves",
    "draw_methods",
    "draw_rounds",
    "name_rows",
    "read_curves",
]

WIDE, NARROW = 7.6, 3.7
LABELLED = 48
"""Above so many clients their names are left out of pictures."""

Curves = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""Method -> the `metrics.jsonl` lines of each of its runs."""


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
    ax.scatter(starts, rows, s=size, facecolors=theme.paper, edgecolors=theme.muted, linewidths=1.3, zorder=2)
    ax.scatter(ends, rows, s=size, color=colour, zorder=3)
    means = sorted([(float(np.nanmean(starts)), theme.muted, "zero-shot"), (float(ends.mean()), colour, "personal")])
    # The lower mean's label stands to its left and the higher one's to its right: close means stay readable.
    for (mean, shade, name), align, shift in zip(means, ("right", "left"), (3, -3), strict=True):
        ax.axvline(mean, color=shade, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        label = {"ha": align, "color": shade, "fontsize": 9, "fontweight": "bold", "textcoords": "offset points"}
        ax.annotate(f"{name} {mean:.1f}", (mean, 1), xycoords=("data", "axes fraction"), xytext=(shift, 3), **label)
    name_rows(ax, order if named else [])
    ax.set_ylabel("" if named else f"{len(order)} clients, sorted")
    ax.set_ylim(-0.8, len(order) - 0.2)
    ax.set_xlabel(f"{find_measure(record.metric).label} on test, %")
    ax.set_xlim(left=max(0.0, min(np.nanmin(starts), ends.min()) - 3))
    return figure


def draw_rounds(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw validation accuracy and training loss over the rounds."""
    width, height = (NARROW, 4.6) if narrow else (WIDE, 2.9)
    figure, (left, right) = make_figure(theme, width, height, columns=1 if narrow else 2, rows=2 if narrow else 1)
    colour = theme.series[choose_series([record.method])[record.method]]
    rounds, values = _read_validation(record.rounds, record.metric)
    left.plot(rounds, values, color=colour, marker="o", markersize=4, linewidth=1.8)
    before = [
        (line["round"], 100 * line["validation"]["before_redistribution"][record.metric])
        for line in record.rounds
        if ((line.get("validation") or {}).get("before_redistribution") or {}).get(record.metric) is not None
    ]
    if before:
        left.plot(*zip(*before, strict=True), color=theme.muted, linewidth=1.2, linestyle=(0, (3, 2)))
    start = record.scores("zero_shot", split="validation")
    if start:
        level = 100 * float(np.mean(list(start.values())))
        left.axhline(level, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)))
        _annotate(left, (1, level), "zero-shot", theme.muted, ("axes fraction", "data"), (0, 3), "right")
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
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_methods(record: ComparisonRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw all clients under each method, and how far each method is ahead of local training client by client."""
    scores = {method: record.scores(method) for method in ["zero-shot", *record.methods]}
    methods = [method for method in scores if scores[method]][::-1]
    rival = "local" if scores.get("local") else methods[-1]
    width, height = (NARROW, 1.7 + 0.95 * len(methods)) if narrow else (WIDE, 1.1 + 0.52 * len(methods))
    shape: dict[str, Any] = {"rows": 2, "columns": 1} if narrow else {"columns": 2, "width_ratios": (1.1, 1)}
    figure, (left, right) = make_figure(theme, width, height, sharey=True, **shape)
    series = choose_series(record.methods)
    for row, method in enumerate(methods):
        colour = theme.muted if method == "zero-shot" else theme.series[series[method]]
        means = mean_over_seeds(scores[method])
        _draw_cloud(left, row, 100 * np.asarray(list(means.values())), colour)
        mean = 100 * float(np.mean([np.mean(list(one.values())) for one in scores[method].values()]))
        left.plot(mean, row, "|", markersize=20, markeredgewidth=2.6, color=theme.ink, zorder=4)
        _annotate(left, (mean, row), f"{mean:.1f}", theme.ink, "data", (0, 12), "center")
        difference = compare_paired(scores[method], scores[rival])
        # Zero-shot lies far below: it would press all others against the edge.
        if method in (rival, "zero-shot") or difference is None:
            far = "" if difference is None else f"{points(difference.mean)}, off the scale"
            word = "the yardstick" if method == rival else far
            _annotate(right, (0.02, row), word, theme.muted, ("axes fraction", "data"), (0, -3), "left")
            continue
        by_client = compare_clients(means, mean_over_seeds(scores[rival]))
        _draw_cloud(right, row, 100 * by_client, colour)
        ends = [[100 * (difference.mean - difference.low)], [100 * (difference.high - difference.mean)]]
        if np.isfinite(ends).all():
            right.errorbar(100 * difference.mean, row, xerr=ends, color=theme.ink, capsize=3, linewidth=1.6, zorder=4)
        right.plot(100 * difference.mean, row, "o", color=theme.ink, markersize=6, zorder=5)
        _annotate(
            right,
            (100 * difference.mean, row),
            points(difference.mean),
            theme.ink,
            "data",
            (0, 10),
            "center",
        )
    name_rows(left, methods)
    left.set_ylim(-0.6, len(methods) - 0.3)
    left.set_xlabel(f"test {find_measure(record.metric).label}, %")
    right.axvline(0, color=theme.muted, linewidth=1)
    right.set_xlabel(f"points ahead of {rival}")
    return figure


def compare_clients(ours: Mapping[str, float], theirs: Mapping[str, float]) -> np.ndarray:
    """Subtract scores client by client, for the clients that both have."""
    return np.asarray([ours[client] - theirs[client] for client in ours if client in theirs])


def read_curves(record: ComparisonRecord) -> dict[str, list[list[dict[str, Any]]]]:
    """Read the rounds of all runs of a comparison by method; a run whose folder is gone is left out."""
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for run in record.runs:
        lines = read_metrics(record.folder_of(run))
        if _read_validation(lines, record.metric)[0]:
            curves.setdefault(run["method"], []).append(lines)
    return curves


def draw_curves(curves: Curves, metric: str, theme: Theme, narrow: bool = False) -> Figure:
    """Draw a validation metric over rounds, and over what one client has sent and received by then."""
    width, height = (NARROW, 5.6) if narrow else (WIDE, 3.1)
    shape = {"rows": 2, "columns": 1} if narrow else {"rows": 1, "columns": 2}
    figure, (left, right) = make_figure(theme, width, height, sharey=True, **shape)
    series = choose_series(list(curves))
    for method, runs in curves.items():
        rounds, values, sent = _average_runs(runs, metric)
        style: dict[str, Any] = {
            "color": theme.series[series[method]],
            "marker": MARKERS[series[method]],
            "markersize": 4,
            "linewidth": 1.6,
        }
        left.plot(rounds, values, label=method, **style)
        if sent[-1] > 0:
            right.plot(np.asarray(sent) / 2**20, values, **style)
        else:
            right.axhline(values[-1], color=style["color"], linewidth=1.2, linestyle=(0, (4, 3)))
            level = (0.02, values[-1])
            _annotate(
                right, level, f"{method}: nothing sent", style["color"], ("axes fraction", "data"), (0, 3), "left"
            )
    left.set_xlabel("round")
    right.set_xlabel("MiB sent and received by a client so far")
    left.set_title(f"Validation {find_measure(metric).label}, %", fontsize=10, loc="left", color=theme.ink)
    for ax in (left, right):
        ax.grid(axis="y", color=theme.grid, linewidth=0.8)
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2 if narrow else 4,
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
    )
    return figure


def _average_runs(
    runs: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> tuple[list[int], list[float], list[float]]:
    """Average a metric over the runs of a method at the rounds that all evaluated, with the bytes moved until then."""
    readings = [dict(zip(*_read_validation(lines, metric), strict=True)) for lines in runs]
    rounds = sorted(set.intersection(*(set(reading) for reading in readings))) or sorted(readings[0])
    values = [float(np.mean([reading[number] for reading in readings if number in reading])) for number in rounds]
    moved = {
        line["round"]: line.get("bytes_up_per_client", 0) + line.get("bytes_down_per_client", 0) for line in runs[0]
    }
    return rounds, values, [sum(count for number, count in moved.items() if number <= last) for last in rounds]


def _read_validation(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Pick the rounds that were evaluated, and their validation metrics in per cent."""
    points = [
        (line["round"], 100 * line["validation"][metric])
        for line in lines
        if (line.get("validation") or {}).get(metric) is not None
    ]
    return [number for number, _ in points], [value for _, value in points]


def _draw_cloud(ax: Any, row: int, values: np.ndarray, colour: str) -> None:
    """Scatter values around a row. The jitter is a fixed pattern: the same report gives the same picture."""
    jitter = 0.13 * np.sin(2.4 * np.arange(len(values)))
    ax.scatter(
        values, row - 0.08 + jitter, s=26 if len(values) <= LABELLED else 8, color=colour, alpha=0.6, linewidths=0
    )


def name_rows(ax: Any, names: Sequence[str]) -> None:
    """Write names beside the rows, as they are: a dollar sign in a client's name starts no formula."""
    ax.set_yticks(range(len(names)), names, parse_math=False)


def _annotate(
    ax: Any, at: tuple[float, float], text: str, colour: str, frame: Any, shift: tuple[int, int], align: str
) -> None:
    ax.annotate(text, at, xycoords=frame, xytext=shift, textcoords="offset points", ha=align, color=colour, fontsize=9)
