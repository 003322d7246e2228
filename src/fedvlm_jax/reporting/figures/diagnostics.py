"""The health of the aggregation over the rounds: what each number says, and its picture for a run and a comparison.

The numbers are those of `federation/health.py`, the drift of private factors, and validation before and after the
server's average replaced what clients had. Rounds of local fine-tuning after a federation are left out: nothing is
aggregated there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.reporting.figures.comparison_figures import Curves
from fedvlm_jax.reporting.figures.label_placement import Label, label_ends
from fedvlm_jax.reporting.figures.run_figures import NARROW, WIDE
from fedvlm_jax.reporting.figures.theme import (
    BEFORE,
    MANY,
    MARKERS,
    Theme,
    choose_series,
    hide_rest,
    make_figure,
    use_whole_numbers,
)
from fedvlm_jax.training.run_dir.reader import RunRecord
from fedvlm_jax.training.validation import plain

__all__ = ["Panel", "draw_health", "draw_method_health", "explain", "list_panels"]

Lines = Sequence[Mapping[str, Any]]
Line = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Panel:
    """A number of the rounds' lines.

    Attributes:
        key: in `metrics.jsonl`.
        title: with the unit.
        sentence: what it says.
        scale: by which it is multiplied to be shown.
    """

    key: str
    title: str
    sentence: str
    scale: float = 1.0


REDISTRIBUTION = "redistribution"
PANELS = (
    Panel(
        "aggregation_error",
        "Aggregation error, %",
        "Aggregation error: how far the product of the averaged factors A and B is from the average of the clients' "
        "products, relative to it; it is what averaging both factors loses, or would lose for a method that does not.",
        100.0,
    ),
    Panel(
        "angle_a",
        "Angle between clients' A, degrees",
        "Angle between clients' A: between what two clients' factors A, as they trained them, can represent; "
        "0 where all are alike, 90 where they share nothing.",
    ),
    Panel(
        "update_dissimilarity",
        "Dissimilarity of updates",
        "Dissimilarity of updates: one minus the cosine of two clients' adapters, mean over pairs; 0 alike, 1 "
        "unrelated, 2 opposed.",
    ),
    Panel(
        "personal_drift",
        "Drift of private A, %",
        "Drift of private A: how far the private factors A went from their start, relative to its norm; 0 where none "
        "is private.",
        100.0,
    ),
    Panel(
        REDISTRIBUTION,
        "Gain by redistribution, points",
        "Redistribution: validation of the round's clients right before and right after the server's average replaced "
        "what they had trained of the shared part.",
        100.0,
    ),
)


def list_panels(runs: Sequence[Lines], metric: str) -> list[Panel]:
    """The numbers that these runs have."""
    return [panel for panel in PANELS if any(_read(lines, panel, metric)[0] for lines in runs)]


def explain(panels: Sequence[Panel], more: str = "") -> str:
    """A caption: one sentence for each number."""
    return " ".join([*(panel.sentence for panel in panels), *([more] if more else [])])


def draw_health(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw a run's numbers, each in axes of its own; the error by halves of the model, redistribution as two lines."""
    panels, lines = list_panels([record.rounds], record.metric), record.rounds
    across = 1 if narrow else min(3, len(panels))
    down = -(-len(panels) // across)
    width, height = (NARROW, 1.75 * down) if narrow else (WIDE, 2.1 * down)
    figure, axes = make_figure(theme, width, height, columns=across, rows=down)
    colour = theme.series[choose_series([record.method])[record.method]]
    groups = []
    for ax, panel in zip(axes, panels, strict=False):
        _dress(ax, panel.title, theme)
        if panel.key == REDISTRIBUTION:
            named = {
                side: _pick(lines, _read_side(f"{side}_redistribution", record.metric), 100)
                for side in ("after", "before")
            }
            ax.set_title(f"Validation {find_measure(record.metric).label}, %", fontsize=9, loc="left", color=theme.ink)
        else:
            parts = sorted({key for line in lines for key in line if key.startswith(f"{panel.key}/")})
            whole = "all" if parts else ""
            keys = {whole: panel.key, **{part.rpartition("/")[2]: part for part in parts}}
            named = {name: _pick(lines, _read_key(key), panel.scale) for name, key in keys.items()}
        for (name, line), dashes in zip(named.items(), _style_lines(len(named)), strict=True):
            shade = theme.muted if name == "before" else colour
            ax.plot(*line, color=shade, linewidth=1.7, linestyle=dashes, marker="o", markersize=3)
        _end_at_zero(ax)
        ends = [Label(name, line[0][-1], line[1][-1], theme.ink) for name, line in named.items() if name and line[0]]
        groups.append((ax, ends))
    label_ends(figure, groups, 8, theme.muted)
    hide_rest(axes, len(panels), across)
    return figure


def draw_method_health(curves: Curves, metric: str, theme: Theme, narrow: bool = False) -> Figure:
    """Draw the numbers of a comparison, one line per method, mean over seeds, named at its end."""
    curves = {method: runs for method, runs in curves.items() if _is_own(method, curves)}
    panels = list_panels([lines for runs in curves.values() for lines in runs], metric)
    across = 1 if narrow else min(2, len(panels))
    down = -(-len(panels) // across)
    many = len(curves) > MANY
    size = 7 if many else 8.5
    each = max(2.0, 0.6 + 1.35 * size / 72 * len(curves))
    figure, axes = make_figure(theme, NARROW if narrow else WIDE, each * down, columns=across, rows=down)
    series = choose_series(list(curves))
    groups = []
    for ax, panel in zip(axes, panels, strict=False):
        _dress(ax, panel.title, theme)
        ends = []
        for method, runs in curves.items():
            rounds, values = _average([_read(lines, panel, metric) for lines in runs])
            if not rounds:
                continue
            colour = theme.series[series[method]]
            marker = "" if many else MARKERS[series[method]]
            ax.plot(rounds, values, color=colour, linewidth=1.4, marker=marker, markersize=3.5)
            ends.append(Label(method, rounds[-1], values[-1], theme.ink))
        if panel.key == REDISTRIBUTION:
            ax.axhline(0, color=theme.muted, linewidth=1)
        _end_at_zero(ax)
        groups.append((ax, ends))
    label_ends(figure, groups, size, theme.muted)
    hide_rest(axes, len(panels), across)
    return figure


def _is_own(method: str, curves: Curves) -> bool:
    """What follows a federation that is there too would draw the same line twice."""
    return method == plain(method) or plain(method) not in curves


def _read(lines: Lines, panel: Panel, metric: str) -> Line:
    if panel.key != REDISTRIBUTION:
        return _pick(lines, _read_key(panel.key), panel.scale)
    before, after = (_read_side(f"{side}_redistribution", metric) for side in ("before", "after"))

    def gain(line: Mapping[str, Any]) -> float | None:
        ends = before(line), after(line)
        return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]

    return _pick(lines, gain, panel.scale)


def _read_key(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda line: line.get(key)


def _read_side(name: str, metric: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda line: ((line.get("validation") or {}).get(name) or {}).get(metric)


def _pick(lines: Lines, read: Callable[[Mapping[str, Any]], float | None], scale: float) -> Line:
    """The federated rounds that have the number, and their values."""
    own = [line for line in lines if line.get("method") == lines[0].get("method")]
    found = [(line["round"], read(line)) for line in own]
    there = [(number, scale * value) for number, value in found if value is not None and np.isfinite(value)]
    return [number for number, _ in there], [value for _, value in there]


def _average(runs: Sequence[Line]) -> Line:
    """Mean over runs at the rounds that all of them have."""
    readings = [dict(zip(*run, strict=True)) for run in runs if run[0]]
    rounds = sorted(set.intersection(*(set(reading) for reading in readings))) if readings else []
    return rounds, [float(np.mean([reading[number] for reading in readings])) for number in rounds]


def _style_lines(count: int) -> list[Any]:
    return ["-", BEFORE, (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 2)), (0, (8, 3))][:count]


def _dress(ax: Any, title: str, theme: Theme) -> None:
    ax.set_title(title, fontsize=9, loc="left", color=theme.ink)
    ax.grid(axis="y", color=theme.grid, linewidth=0.8)
    ax.grid(visible=False, axis="x")
    ax.tick_params(labelsize=8)
    ax.set_xlabel("round", fontsize=8)
    use_whole_numbers(ax)


def _end_at_zero(ax: Any) -> None:
    """All but the gain are zero or more: an axis that begins elsewhere would make small things large."""
    low, high = ax.get_ylim()
    if min([*(float(np.min(line.get_ydata())) for line in ax.lines if len(line.get_ydata())), 0.0]) >= 0:
        ax.set_ylim(0, high if high > 0 else 1)
    else:
        ax.set_ylim(low, high)
