"""The pictures of a comparison: all methods side by side, and their course over rounds and over bytes.

Up to eight methods have a colour and a marker each and share their axes. With more of them, rows and small panels carry
the names, and methods are ordered by their mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, mean_over_seeds, order_by_mean
from fedvlm_jax.reporting.figures.run_figures import LABELLED, NARROW, WIDE, annotate, name_rows, read_validation
from fedvlm_jax.reporting.figures.theme import (
    MANY,
    MARKERS,
    Theme,
    choose_series,
    hide_rest,
    make_figure,
    use_whole_numbers,
)
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.training.run_dir.reader import ComparisonRecord, read_metrics

__all__ = ["Curves", "draw_curves", "draw_methods", "draw_panels", "read_curves", "read_rounds"]

Curves = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""Method -> the `metrics.jsonl` lines of each of its runs."""

SENT = "MiB sent and received by a client so far"


def draw_methods(record: ComparisonRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw all clients under each method, and how far each method is ahead of local training client by client."""
    scores = {method: record.scores(method) for method in ["zero-shot", *record.methods]}
    methods = [method for method in scores if scores[method]]
    dense = len(methods) > MANY + 1
    methods = (order_by_mean(scores, methods) if dense else methods)[::-1]
    rival = "local" if scores.get("local") else methods[-1]
    row = ((0.42, 0.22) if dense else (0.95, 0.52))[not narrow]
    shape: dict[str, Any] = {"rows": 2, "columns": 1} if narrow else {"columns": 2, "width_ratios": (1.1, 1)}
    height = (1.7 if narrow else 1.1) + row * len(methods)
    figure, (left, right) = make_figure(theme, NARROW if narrow else WIDE, height, sharey=True, **shape)
    series = choose_series(record.methods)
    size = 8 if dense else 9
    for place, method in enumerate(methods):
        colour = theme.muted if method == "zero-shot" else theme.series[series[method]]
        means = mean_over_seeds(scores[method])
        _draw_cloud(left, place, 100 * np.asarray(list(means.values())), colour, dense)
        mean = 100 * float(np.mean([np.mean(list(one.values())) for one in scores[method].values()]))
        bar = {"markersize": 11, "markeredgewidth": 2} if dense else {"markersize": 20, "markeredgewidth": 2.6}
        left.plot(mean, place, "|", color=theme.ink, zorder=4, **bar)
        difference = compare_paired(scores[method], scores[rival])
        if dense:  # no room between the rows: figures stand at their ends
            _write_at_end(left, place, f"{mean:.1f}", theme.ink)
        else:
            annotate(left, (mean, place), f"{mean:.1f}", theme.ink, "data", (0, 12), "center")
        # Zero-shot lies far below: it would press all others against the edge.
        if method in (rival, "zero-shot") or difference is None:
            far = "" if difference is None else f"{points(difference.mean)}, not drawn"
            word = "the yardstick" if method == rival else far
            annotate(right, (0.02, place), word, theme.muted, ("axes fraction", "data"), (0, -3), "left", size)
            continue
        by_client = compare_clients(means, mean_over_seeds(scores[rival]))
        _draw_cloud(right, place, 100 * by_client, colour, dense)
        centre = 100 * difference.mean
        ends = [[centre - 100 * difference.low], [100 * difference.high - centre]]
        if np.isfinite(ends).all():
            right.errorbar(
                centre, place, xerr=ends, color=theme.ink, capsize=2 if dense else 3, linewidth=1.6, zorder=4
            )
        right.plot(centre, place, "o", color=theme.ink, markersize=4 if dense else 6, zorder=5)
        if dense:
            _write_at_end(right, place, points(difference.mean), theme.ink)
        else:
            annotate(right, (centre, place), points(difference.mean), theme.ink, "data", (0, 10), "center")
    name_rows(left, methods)
    for ax in (left, right):
        ax.tick_params(axis="y", labelsize=size)
    left.set_ylim(-0.6, len(methods) - 0.3)
    left.set_xlabel(f"test {find_measure(record.metric).label}, %")
    right.axvline(0, color=theme.muted, linewidth=1)
    right.set_xlabel(f"points ahead of {rival}")
    return figure


def compare_clients(ours: Mapping[str, float], theirs: Mapping[str, float]) -> np.ndarray:
    """Subtract scores client by client, for the clients that both have."""
    return np.asarray([ours[client] - theirs[client] for client in ours if client in theirs])


def read_rounds(record: ComparisonRecord) -> dict[str, list[list[dict[str, Any]]]]:
    """Read the rounds of all runs of a comparison by method; a run whose folder is gone is left out."""
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for run in record.runs:
        if lines := read_metrics(record.folder_of(run)):
            curves.setdefault(run["method"], []).append(lines)
    return curves


def read_curves(record: ComparisonRecord) -> dict[str, list[list[dict[str, Any]]]]:
    """Read the rounds of all runs that were evaluated on the way, by method, the best method first where many."""
    rounds = {
        method: [lines for lines in runs if read_validation(lines, record.metric)[0]]
        for method, runs in read_rounds(record).items()
    }
    there = [method for method, runs in rounds.items() if runs]
    if len(there) > MANY:
        there = order_by_mean({method: record.scores(method) for method in there}, there)
    return {method: rounds[method] for method in there}


def draw_curves(curves: Curves, metric: str, theme: Theme, narrow: bool = False) -> Figure:
    """Draw a validation metric over rounds, and over what one client has sent and received by then."""
    title = f"Validation {find_measure(metric).label}, %"
    averaged = {method: _average_runs(runs, metric) for method, runs in curves.items()}
    if len(curves) > MANY:
        over_rounds = {method: (rounds, values) for method, (rounds, values, _) in averaged.items()}
        return draw_panels(over_rounds, title, "round", theme, narrow)
    width, height = (NARROW, 5.6) if narrow else (WIDE, 3.1)
    shape = {"rows": 2, "columns": 1} if narrow else {"rows": 1, "columns": 2}
    figure, (left, right) = make_figure(theme, width, height, sharey=True, **shape)
    series = choose_series(list(curves))
    for method, (rounds, values, sent) in averaged.items():
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
            annotate(right, level, f"{method}: nothing sent", style["color"], ("axes fraction", "data"), (0, 3), "left")
    left.set_xlabel("round")
    right.set_xlabel(SENT)
    left.set_title(title, fontsize=10, loc="left", color=theme.ink)
    for ax in (left, right):
        ax.grid(axis="y", color=theme.grid, linewidth=0.8)
    use_whole_numbers(left)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2 if narrow else 4,
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
    )
    return figure


def draw_panels(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, below: str, theme: Theme, narrow: bool
) -> Figure:
    """Draw one small panel per method: its own line strong, those of all others faint behind it."""
    across = 3 if narrow else 5
    down = -(-len(lines) // across)
    shape = {"sharex": True, "sharey": True}
    size = (NARROW, 0.75 + 1.0 * down) if narrow else (WIDE, 0.8 + 1.25 * down)
    figure, axes = make_figure(theme, *size, columns=across, rows=down, **shape)
    for ax, (method, (x, y)) in zip(axes, lines.items(), strict=False):
        for other_x, other_y in lines.values():
            ax.plot(other_x, other_y, color=theme.grid, linewidth=0.7, zorder=1)
        ax.plot(x, y, color=theme.series[0], linewidth=1.8, zorder=3)
        ax.plot(x[-1], y[-1], "o", color=theme.series[0], markersize=3.5, zorder=3)
        annotate(ax, (x[-1], y[-1]), f"{y[-1]:.1f}", theme.ink, "data", (-2, -11), "right", 7.5)
        ax.set_title(method, fontsize=7.5 if narrow else 9, loc="left", color=theme.ink, pad=3, parse_math=False)
        ax.grid(axis="y", color=theme.grid, linewidth=0.6)
        ax.grid(visible=False, axis="x")
        ax.tick_params(labelsize=7 if narrow else 8)
        use_whole_numbers(ax, 3)
    hide_rest(axes, len(lines), across)
    figure.supxlabel(below, fontsize=9, color=theme.muted)
    figure.suptitle(title, fontsize=10, color=theme.ink, x=0.01, ha="left")
    return figure


def _average_runs(
    runs: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> tuple[list[int], list[float], list[float]]:
    """Average a metric over the runs of a method at the rounds that all evaluated, with the bytes moved until then."""
    readings = [dict(zip(*read_validation(lines, metric), strict=True)) for lines in runs]
    rounds = sorted(set.intersection(*(set(reading) for reading in readings))) or sorted(readings[0])
    values = [float(np.mean([reading[number] for reading in readings if number in reading])) for number in rounds]
    moved = {
        line["round"]: line.get("bytes_up_per_client", 0) + line.get("bytes_down_per_client", 0) for line in runs[0]
    }
    return rounds, values, [sum(count for number, count in moved.items() if number <= last) for last in rounds]


def _draw_cloud(ax: Any, row: int, values: np.ndarray, colour: str, dense: bool) -> None:
    """Scatter values around a row. The jitter is a fixed pattern: the same report gives the same picture."""
    jitter = 0.13 * np.sin(2.4 * np.arange(len(values)))
    size = 8 if dense or len(values) > LABELLED else 26
    ax.scatter(values, row - 0.08 + jitter, s=size, color=colour, alpha=0.6, linewidths=0)


def _write_at_end(ax: Any, row: int, text: str, colour: str) -> None:
    annotate(ax, (1.01, row), text, colour, ("axes fraction", "data"), (0, -3), "left", 8)
