"""What accuracy costs in bytes: every method's test score against all that a client sent and received."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_seeds import spread
from fedvlm_jax.reporting.figures.comparison_figures import Curves
from fedvlm_jax.reporting.figures.label_placement import Label, label_points
from fedvlm_jax.reporting.figures.run_figures import NARROW, WIDE, annotate
from fedvlm_jax.reporting.figures.theme import MARKERS, Theme, choose_series, make_figure
from fedvlm_jax.reporting.tables import format_bytes
from fedvlm_jax.training.run_dir.reader import ComparisonRecord

__all__ = ["Cost", "draw_pareto", "find_front", "read_costs"]


class Cost(NamedTuple):
    """What a method came to, and what it moved.

    Attributes:
        method: its name.
        sent: bytes up and down of a client that takes part in every round, over the whole run, mean over seeds.
        mean, std: the test score in per cent, mean over clients and then over seeds; std over seeds, None with one.
    """

    method: str
    sent: float
    mean: float
    std: float | None


def read_costs(record: ComparisonRecord, rounds: Curves) -> list[Cost]:
    """Zero-shot and every method of which there are both scores and rounds."""
    found = []
    for method in ("zero-shot", *record.methods):
        scores = record.scores(method)
        if not scores or (method != "zero-shot" and method not in rounds):
            continue
        result = spread([100 * float(np.mean(list(one.values()))) for one in scores.values()])
        sent = float(np.mean([_count_bytes(lines) for lines in rounds[method]])) if method in rounds else 0.0
        found.append(Cost(method, sent, result.mean, result.std))
    return found


def _count_bytes(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(line.get("bytes_up_per_client", 0) + line.get("bytes_down_per_client", 0) for line in lines)


def find_front(costs: Sequence[Cost]) -> list[Cost]:
    """The Pareto front, cheapest first: those that no other one matches in both and beats in one."""

    def beats(one: Cost, other: Cost) -> bool:
        return one.sent <= other.sent and one.mean >= other.mean and (one.sent, one.mean) != (other.sent, other.mean)

    front = [cost for cost in costs if not any(beats(other, cost) for other in costs)]
    return sorted(front, key=lambda cost: (cost.sent, cost.mean))


def draw_pareto(costs: Sequence[Cost], metric: str, theme: Theme, narrow: bool = False) -> Figure:
    """Draw test score over bytes, on a log axis with "nothing sent" at its left, the Pareto front as a stair."""
    many = len(costs) > 10
    height = (5.4 if many else 4.2) if narrow else (5.2 if many else 3.8)
    figure, (ax,) = make_figure(theme, NARROW if narrow else WIDE, height)
    sending = sorted(cost.sent for cost in costs if cost.sent)
    low, high = (sending[0], sending[-1]) if sending else (1.0, 1.0)
    step = max((high / low) ** 0.22, 2.0)
    nowhere = low / step**1.5  # where those stand that send nothing: off the axis
    series = choose_series([cost.method for cost in costs])
    front = find_front(costs)
    labels, shown = [], _leave_out_far(costs)
    places = {cost.method: (cost.sent or nowhere, cost.mean) for cost in costs}
    stair = [places[cost.method] for cost in front]
    stair.append((high * step**1.1, stair[-1][1]))
    ax.set_xscale("log")
    ax.step(
        *zip(*stair, strict=True),
        where="post", color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1,
    )  # fmt: skip
    for cost in shown:
        x, y = places[cost.method]
        colour = theme.muted if cost.method == "zero-shot" else theme.series[series[cost.method]]
        if cost.std is not None:
            ax.errorbar(x, y, yerr=cost.std, color=colour, linewidth=1, alpha=0.55, zorder=2)
        best = cost in front
        ax.plot(
            x, y, MARKERS[series[cost.method]], color=colour, markersize=7 if best else 5, zorder=3,
            markeredgecolor=theme.ink if best else colour,
        )  # fmt: skip
        labels.append(Label(cost.method, x, y, theme.ink, best))
    ax.set_xlim(nowhere / step**0.8, high * step**1.2)
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom - 0.04 * (top - bottom), top + 0.06 * (top - bottom))
    _mark_bytes(ax, low, high, nowhere, narrow)
    if any(not cost.sent for cost in costs) and sending:
        ax.axvline(low / step**0.75, color=theme.muted, linewidth=0.8, linestyle=(0, (1, 2)))
    ax.grid(axis="y", color=theme.grid, linewidth=0.8)
    ax.set_xlabel("sent and received by a client in all rounds (log scale)")
    title = f"Test {find_measure(metric).label}, %; bold: on the Pareto front"
    ax.set_title(title, fontsize=10, loc="left", color=theme.ink)
    for cost in costs:
        if cost not in shown:
            text = f"{cost.method} {cost.mean:.1f}, off the scale"
            annotate(ax, (0.01, 0), text, theme.muted, "axes fraction", (0, 4), "left", 8)
    steps = [
        segment
        for (x, y), (next_x, next_y) in itertools.pairwise(stair)
        for segment in (((x, y), (next_x, y)), ((next_x, y), (next_x, next_y)))
    ]
    label_points(ax, labels, (6.5 if many else 8) if narrow else (7.5 if many else 9), theme.muted, steps)
    return figure


def _leave_out_far(costs: Sequence[Cost]) -> list[Cost]:
    """Without zero-shot where it lies so far below that the others would be pressed together."""
    others = [cost.mean for cost in costs if cost.method != "zero-shot"]
    room = 1.5 * max(max(others) - min(others), 2.0)
    return [cost for cost in costs if cost.method != "zero-shot" or cost.mean > min(others) - room]


def _mark_bytes(ax: Any, low: float, high: float, nowhere: float, narrow: bool) -> None:
    """Ticks at powers of two, written as bytes, and one for those that send nothing."""
    ticks = [
        tick for tick in LogLocator(base=2, numticks=4 if narrow else 6).tick_values(low, high) if low <= tick <= high
    ]
    ax.xaxis.set_major_locator(FixedLocator([nowhere, *(ticks if len(ticks) > 1 else sorted({low, high}))]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "nothing" if x <= nowhere * 1.001 else format_bytes(x)))
