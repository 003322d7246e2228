"""The health of the aggregation over the rounds: its numbers, what each says, and their figure.

The numbers are those of `federation/diagnostics.py`, the drift of private factors, and validation before and after the
server's average replaced what clients had. Rounds of local fine-tuning after a federation are left out: nothing is
aggregated there.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fedvlm_jax.config.validation import plain
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.round_lines import (
    Line,
    Lines,
    Rounds,
    average,
    pick,
    read_rounds,
    read_validation,
)
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A number of the rounds' lines.

    Attributes:
        key: in `metrics.jsonl`.
        title: with the unit.
        sentence: its meaning, for the caption.
        scale: by which it is multiplied to be shown.
    """

    key: str
    title: str
    sentence: str
    scale: float = 1.0


class Curve(NamedTuple):
    """A line over rounds, by what it is called and how it looks."""

    name: str
    rounds: list[int]
    values: list[float]
    look: Mapping[str, Any]


REDISTRIBUTION = "redistribution"
PANELS = (
    Panel(
        key="aggregation_error",
        title="Aggregation error, %",
        sentence="Aggregation error: how far the product of the averaged factors A and B is from the average of the "
        "clients' products, relative to it; it is what averaging both factors loses, or would lose for a method that "
        "does not.",
        scale=100.0,
    ),
    Panel(
        key="angle_a",
        title="Angle between clients' A, degrees",
        sentence="Angle between clients' A: between what two clients' factors A, as they trained them, can represent; "
        "0 where all are alike, 90 where they share nothing.",
    ),
    Panel(
        key="update_dissimilarity",
        title="Dissimilarity of updates",
        sentence="Dissimilarity of updates: one minus the cosine of two clients' adapters, mean over pairs; 0 alike, 1 "
        "unrelated, 2 opposed.",
    ),
    Panel(
        key="personal_drift",
        title="Drift of private A, %",
        sentence="Drift of private A: how far the private factors A went from their start, relative to its norm; 0 "
        "where none is private.",
        scale=100.0,
    ),
    Panel(
        key=REDISTRIBUTION,
        title="Gain by redistribution, points",
        sentence="Redistribution: validation of the round's clients right before and right after the server's average "
        "replaced what they had trained of the shared part.",
        scale=100.0,
    ),
)
OF_RUN = "Mean over the round's clients or their pairs. Encoder, decoder: the model's halves by themselves."
OF_METHODS = "One line per method, mean over seeds; with +ft or +knn after its name it has its federation's line."
DASHES = ("-", theme.BEFORE, (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 2)), (0, (8, 3)))


def draw_run_health(record: RunRecord, target: Path, prefix: str = "") -> list[theme.Picture]:
    """Draw and save the health of a run's aggregation; nothing where its lines have none."""
    if not (panels := list_panels([record.rounds], record.metric)):
        return []
    return [theme.save_picture(draw_health(record), target, f"{prefix}health", _explain(panels, OF_RUN))]


def draw_comparison_health(record: ComparisonRecord, target: Path) -> list[theme.Picture]:
    """Draw and save the health of all methods' aggregation; nothing where no run's lines have any."""
    curves = read_rounds(record)
    if not (panels := list_panels([lines for runs in curves.values() for lines in runs], record.metric)):
        return []
    figure = draw_method_health(curves, record.metric)
    return [theme.save_picture(figure, target, "health", _explain(panels, OF_METHODS))]


def list_panels(runs: Sequence[Lines], metric: str) -> list[Panel]:
    """List the numbers that these runs have."""
    return [panel for panel in PANELS if any(_read_panel(lines, panel, metric)[0] for lines in runs)]


def _explain(panels: Sequence[Panel], more: str) -> str:
    return " ".join([*(panel.sentence for panel in panels), more])


@theme.style()
def draw_health(record: RunRecord) -> Figure:
    """Draw a run's numbers, each in axes of its own; the error by halves of the model, redistribution as two lines."""
    colour = theme.SERIES[theme.choose_series([record.method])[record.method]]
    lines = _leave_out_tuning(record.rounds)
    panels: dict[str, list[Curve]] = {}
    for panel in list_panels([lines], record.metric):
        title = panel.title
        if panel.key == REDISTRIBUTION:
            title = f"Validation {find_measure(record.metric).label}, %"
            reads = {side: read_validation(record.metric, side) for side in ("after", "before")}
        else:
            parts = sorted({key for line in lines for key in line if key.startswith(f"{panel.key}/")})
            keys = {"all" if parts else "": panel.key, **{part.rpartition("/")[2]: part for part in parts}}
            reads = {name: operator.methodcaller("get", key) for name, key in keys.items()}
        panels[title] = [
            Curve(
                name,
                *pick(lines, read, panel.scale),
                {"color": theme.MUTED if name == "before" else colour, "linestyle": dashes, "marker": "o"},
            )
            for (name, read), dashes in zip(reads.items(), DASHES, strict=False)
        ]
    return _draw_panels(panels, 3, 2.1, 8)


@theme.style()
def draw_method_health(curves: Rounds, metric: str) -> Figure:
    """Draw the numbers of a comparison, one line per method, mean over seeds, named at its end."""
    # A method that follows a federation which is compared too would draw the same line twice.
    curves = {method: runs for method, runs in curves.items() if method == plain(method) or plain(method) not in curves}
    many = len(curves) > theme.MANY
    series = theme.choose_series(list(curves))
    panels = {
        panel.title: [
            Curve(
                method,
                *average([_read_panel(lines, panel, metric) for lines in runs]),
                {"color": theme.SERIES[series[method]], "marker": "" if many else theme.MARKERS[series[method]]},
            )
            for method, runs in curves.items()
        ]
        for panel in list_panels([lines for runs in curves.values() for lines in runs], metric)
    }
    size = 7 if many else 8.5
    return _draw_panels(panels, 2, max(2.0, 0.6 + 1.35 * size / 72 * len(curves)), size)


def _draw_panels(panels: Mapping[str, Sequence[Curve]], across: int, height: float, size: float) -> Figure:
    """Draw curves by title, with their names in letters of `size` points at their ends."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    figure, axes = theme.make_figure(theme.WIDE, height * down, columns=across, rows=down)
    groups = []
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for curve in curves:
            ax.plot(curve.rounds, curve.values, linewidth=1.5, markersize=3, **curve.look)
        ax.set_title(title, fontsize=9)
        ax.grid(axis="y")
        ax.grid(visible=False, axis="x")
        ax.tick_params(labelsize=8)
        ax.set_xlabel("round", fontsize=8)
        theme.use_whole_numbers(ax)
        if all(value >= 0 for curve in curves for value in curve.values):
            # An axis that begins elsewhere makes small things large.
            ax.set_ylim(0, max(ax.get_ylim()[1], 0) or 1)
        else:
            ax.axhline(0, color=theme.MUTED, linewidth=1)
        groups.append((ax, [theme.Name(c.name, c.rounds[-1], c.values[-1]) for c in curves if c.name and c.rounds]))
    theme.name_beside(figure, groups, size)
    theme.hide_rest(axes, len(panels), across)
    return figure


def _read_panel(lines: Lines, panel: Panel, metric: str) -> Line:
    before, after = read_validation(metric, "before"), read_validation(metric, "after")

    def read(line: Mapping[str, Any]) -> float | None:
        if panel.key != REDISTRIBUTION:
            return line.get(panel.key)
        start, end = before(line), after(line)
        return None if start is None or end is None else end - start

    return pick(_leave_out_tuning(lines), read, panel.scale)


def _leave_out_tuning(lines: Lines) -> Lines:
    return [line for line in lines if line.get("method") == lines[0].get("method")]
