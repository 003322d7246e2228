"""The health of the aggregation over the rounds: its numbers, their meanings, and their figure.

The numbers are those of `federation/diagnostics.py`, the drift of private factors, and validation before and after the
server's average replaced what clients had. Rounds of local fine-tuning after a federation are left out: nothing is
aggregated there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fedvlm_jax.config.option_checks import plain
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.round_lines import Lines, Rounds, average, lift_validation, pick, read_rounds
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord


class Panel(NamedTuple):
    """A number of the rounds' lines: its title, its meaning for the caption, and the factor by which it is shown."""

    key: str
    title: str
    sentence: str
    scale: float


class Curve(NamedTuple):
    """A line over rounds, with its name and its look."""

    name: str
    rounds: list[int]
    values: list[float]
    look: Mapping[str, Any]


PANELS = tuple(Panel(**entry) for entry in theme.LOOK["health"])
DASHES = ("-", theme.BEFORE, (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 2)), (0, (8, 3)))


def draw_run_health(record: RunRecord, target: Path, prefix: str = "") -> list[theme.Picture]:
    """Draw and save the health of a run's aggregation; nothing where its lines have none."""
    panels = list_panels([lift_validation(record.rounds, record.metric)])
    if not panels:
        return []
    caption = " ".join([*(panel.sentence for panel in panels), theme.CAPTIONS["run"]["health"]])
    return [theme.save_picture(draw_health(record), target, f"{prefix}health", caption)]


def draw_comparison_health(record: ComparisonRecord, target: Path) -> list[theme.Picture]:
    """Draw and save the health of all methods' aggregation; nothing where no run's lines have any."""
    rounds = read_rounds(record)
    panels = list_panels([lines for runs in rounds.values() for lines in runs])
    if not panels:
        return []
    caption = " ".join([*(panel.sentence for panel in panels), theme.CAPTIONS["comparison"]["health"]])
    return [theme.save_picture(draw_method_health(rounds), target, "health", caption)]


def list_panels(runs: Sequence[Lines]) -> list[Panel]:
    """List the numbers that these runs have."""
    return [panel for panel in PANELS if any(pick(_leave_out_tuning(lines), panel.key)[0] for lines in runs)]


def _leave_out_tuning(lines: Lines) -> Lines:
    return [line for line in lines if line.get("method") == lines[0].get("method")]


@theme.style()
def draw_health(record: RunRecord) -> Figure:
    """Draw each of a run's numbers in its own axes; the error by halves of the model, redistribution as two lines."""
    colour = theme.SERIES[theme.choose_series([record.method])[record.method]]
    lines = _leave_out_tuning(lift_validation(record.rounds, record.metric))
    panels: dict[str, list[Curve]] = {}
    for panel in list_panels([lines]):
        parts = sorted({key for line in lines for key in line if key.startswith(f"{panel.key}/")})
        keys = {"all" if parts else "": panel.key, **{part.rpartition("/")[2]: part for part in parts}}
        title = panel.title
        if panel.key == "redistribution":
            title, keys = f"Validation {find_measure(record.metric).label}, %", {"after": "after", "before": "before"}
        panels[title] = [
            Curve(
                name,
                *pick(lines, key, panel.scale),
                {"color": theme.MUTED if name == "before" else colour, "linestyle": dashes, "marker": "o"},
            )
            for (name, key), dashes in zip(keys.items(), DASHES, strict=False)
        ]
    return _draw_panels(panels, 3, 2.1, 8)


@theme.style()
def draw_method_health(rounds: Rounds) -> Figure:
    """Draw the numbers of a comparison, one line per method, mean over seeds, named at its end."""
    # A method that follows a federation which is compared too would draw the same line twice.
    curves = {method: runs for method, runs in rounds.items() if method == plain(method) or plain(method) not in rounds}
    many = len(curves) > theme.MANY
    series = theme.choose_series(list(curves))
    panels = {
        panel.title: [
            Curve(
                method,
                *average([pick(_leave_out_tuning(lines), panel.key, panel.scale) for lines in runs]),
                {"color": theme.SERIES[series[method]], "marker": "" if many else theme.MARKERS[series[method]]},
            )
            for method, runs in curves.items()
        ]
        for panel in list_panels([lines for runs in curves.values() for lines in runs])
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
