"""The figures of a comparison's costs: test score against bytes, and validation over rounds and over bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_seeds import order_by_mean, spread
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.round_lines import Line, Rounds, average, pick, read_rounds
from fedvlm_jax.reporting.score_tables import read_scores
from fedvlm_jax.reporting.tables import format_bytes
from fedvlm_jax.run_dir.reader import ComparisonRecord


class Cost(NamedTuple):
    """A method's bytes, and its test score in per cent, mean over clients and then over seeds."""

    method: str
    sent: float  # up and down, by a client that takes part in every round of the run, mean over seeds
    mean: float
    std: float | None  # over seeds; None with one


def draw_costs(record: ComparisonRecord, target: Path) -> list[theme.Picture]:
    """Draw and save accuracy against bytes and rounds; nothing where no run's folder is left."""
    captions, pictures = theme.CAPTIONS["comparison"], list[theme.Picture]()
    rounds = read_rounds(record)
    costs = read_costs(record, rounds)
    if any(cost.method != "zero-shot" for cost in costs):
        missing = sorted(set(record.methods) - {cost.method for cost in costs})
        caption = captions["pareto"] + (f" Without their runs' folders: {', '.join(missing)}." if missing else "")
        pictures.append(theme.save_picture(draw_pareto(costs, record.metric), target, "pareto", caption))
    if curves := read_curves(record, rounds):
        caption = captions["curves_of_many" if len(curves) > theme.MANY else "curves"]
        pictures.append(theme.save_picture(draw_curves(curves, record.metric), target, "curves", caption))
    return pictures


def read_curves(record: ComparisonRecord, rounds: Rounds) -> Rounds:
    """Pick the runs that were evaluated on the way, by method, the best method first where there are many."""
    found = {method: [lines for lines in runs if pick(lines, "validation")[0]] for method, runs in rounds.items()}
    evaluated = [method for method, runs in found.items() if runs]
    if len(evaluated) > theme.MANY:
        evaluated = order_by_mean({method: record.scores(method) for method in evaluated}, evaluated)
    return {method: found[method] for method in evaluated}


def read_costs(record: ComparisonRecord, rounds: Rounds) -> list[Cost]:
    """Find the costs of zero-shot and of every method of which there are both scores and rounds."""
    found = []
    for method, scores in read_scores(record).items():
        if method == "zero-shot" or method in rounds:
            result = spread([100 * float(np.mean(list(by_client.values()))) for by_client in scores.values()])
            sent = [sum(map(_read_bytes, lines)) for lines in rounds.get(method, [])]
            found.append(Cost(method, float(np.mean(sent or [0])), result.mean, result.std))
    return found


def _read_bytes(line: Mapping[str, Any]) -> int:
    return line.get("bytes_up_per_client", 0) + line.get("bytes_down_per_client", 0)


def find_front(costs: Sequence[Cost]) -> list[Cost]:
    """Find the Pareto front, cheapest first: those that no other one matches in both and beats in one.

    >>> [cost.method for cost in find_front([Cost("a", 0, 50, None), Cost("b", 9, 49, None), Cost("c", 9, 60, None)])]
    ['a', 'c']
    """

    def beats(one: Cost, other: Cost) -> bool:
        return one.sent <= other.sent and one.mean >= other.mean and (one.sent, one.mean) != (other.sent, other.mean)

    front = [cost for cost in costs if not any(beats(other, cost) for other in costs)]
    return sorted(front, key=lambda cost: (cost.sent, cost.mean))


@theme.style()
def draw_pareto(costs: Sequence[Cost], metric: str) -> Figure:
    """Draw test score over bytes, on a log axis with "nothing sent" at its left, the Pareto front as a stair."""
    many = len(costs) > 10
    figure, (ax,) = theme.make_figure(theme.WIDE, 5.2 if many else 3.8)
    sending = sorted(cost.sent for cost in costs if cost.sent) or [1.0]
    low, high = sending[0], sending[-1]
    series = theme.choose_series([cost.method for cost in costs])
    # Zero-shot is left out where it lies so far below that the others would be pressed together.
    others = [cost.mean for cost in costs if cost.method != "zero-shot"]
    room = 1.5 * max(max(others) - min(others), 2.0)
    shown = [cost for cost in costs if cost.method != "zero-shot" or cost.mean > min(others) - room]
    front = find_front(costs)
    stair = [(cost.sent, cost.mean) for cost in front]
    stair.append((1.5 * high, stair[-1][1]))
    # Logarithmic, but for a linear piece with zero at the left, where the methods are that send nothing.
    ax.set_xscale("symlog", base=2, linthresh=low / 2)
    ax.step(*zip(*stair, strict=True), where="post", color=theme.MUTED, linewidth=1.2, linestyle=theme.LEVEL, zorder=1)
    for cost in shown:
        x, y = cost.sent, cost.mean
        colour = theme.MUTED if cost.method == "zero-shot" else theme.SERIES[series[cost.method]]
        if cost.std is not None:
            ax.errorbar(x, y, yerr=cost.std, color=colour, linewidth=1, alpha=0.55, zorder=2)
        look = {"markersize": 7, "markeredgecolor": theme.INK} if cost in front else {"markersize": 5}
        ax.plot(x, y, theme.MARKERS[series[cost.method]], color=colour, zorder=3, **look)
    ax.set_xlim(-low / 6, 1.5 * high)
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom - 0.04 * (top - bottom), top + 0.06 * (top - bottom))
    ticks = [tick for tick in LogLocator(base=2, numticks=6).tick_values(low, high) if low <= tick <= high]
    ax.xaxis.set_major_locator(FixedLocator([0, *(ticks if len(ticks) > 1 else sorted({low, high}))]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x) if x else "nothing"))
    if any(not cost.sent for cost in costs):
        ax.axvline(0.7 * low, color=theme.MUTED, linewidth=0.8, linestyle=theme.DOTTED)
    ax.grid(axis="y")
    ax.set_xlabel("sent and received by a client in all rounds (log scale)")
    ax.set_title(f"Test {find_measure(metric).label}, %; bold: on the Pareto front")
    for cost in costs:
        if cost not in shown:
            text = f"{cost.method} {cost.mean:.1f}, off the scale"
            theme.annotate(ax, (0.01, 0), text, "axes fraction", (0, 4), "left", color=theme.MUTED, fontsize=8)
    names = [theme.Name(cost.method, cost.sent, cost.mean, cost in front) for cost in shown]
    theme.name_beside(figure, [(ax, names)], 7.5 if many else 9)
    return figure


@theme.style()
def draw_curves(curves: Rounds, metric: str) -> Figure:
    """Draw validation over rounds, and over bytes that a client has sent and received by then.

    Of many methods each has a small panel over rounds.
    """
    title = f"Validation {find_measure(metric).label}, %"
    averaged = {method: average([pick(lines, "validation", 100) for lines in runs]) for method, runs in curves.items()}
    if len(curves) > theme.MANY:
        return _draw_panels(averaged, title)
    figure, (left, right) = theme.make_figure(theme.WIDE, 3.1, columns=2, sharey=True)
    series = theme.choose_series(list(curves))
    for method, (rounds, values) in averaged.items():
        moved = [(line["round"], _read_bytes(line)) for line in curves[method][0]]
        sent = [sum(count for number, count in moved if number <= last) for last in rounds]
        colour, marker = theme.SERIES[series[method]], theme.MARKERS[series[method]]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6}
        left.plot(rounds, values, label=method, **look)
        if sent[-1] > 0:
            right.plot(np.asarray(sent) / 2**20, values, **look)
        else:
            right.axhline(values[-1], color=colour, linewidth=1.2, linestyle=theme.LEVEL)
            place, frame = (0.02, values[-1]), ("axes fraction", "data")
            theme.annotate(right, place, f"{method}: nothing sent", frame, (0, 3), "left", color=colour)
    left.set(xlabel="round", title=title)
    right.set(xlabel="MiB sent and received by a client so far")
    for ax in (left, right):
        ax.grid(axis="y")
    theme.use_whole_numbers(left)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def _draw_panels(lines: Mapping[str, Line], title: str) -> Figure:
    across = 5
    down = -(-len(lines) // across)
    figure, axes = theme.make_figure(theme.WIDE, 0.8 + 1.25 * down, columns=across, rows=down, sharex=True, sharey=True)
    for ax, (method, (x, y)) in zip(axes, lines.items(), strict=False):
        for other_x, other_y in lines.values():
            ax.plot(other_x, other_y, color=theme.GRID, linewidth=0.7, zorder=1)
        ax.plot(x, y, color=theme.SERIES[0], linewidth=1.8, marker="o", markevery=[-1], markersize=3.5, zorder=3)
        theme.annotate(ax, (x[-1], y[-1]), f"{y[-1]:.1f}", "data", (-2, -11), "right", fontsize=7.5)
        ax.set_title(method, fontsize=9, pad=3)
        ax.grid(axis="y", linewidth=0.6)
        ax.grid(visible=False, axis="x")
        ax.tick_params(labelsize=8)
        theme.use_whole_numbers(ax, 3)
    theme.hide_rest(axes, len(lines), across)
    figure.supxlabel("round", fontsize=9, color=theme.MUTED)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure
