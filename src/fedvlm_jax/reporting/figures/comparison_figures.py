"""The figures of a comparison's scores: all methods side by side, method × client, and the gains of clients.

With more than eight methods, rows and small panels carry the names, and methods are ordered by their mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, mean_over_seeds, order_by_mean
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.heatmaps import draw_heatmap
from fedvlm_jax.reporting.score_tables import RIVALS
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.run_dir.reader import ComparisonRecord

METHODS = (
    "Dots are clients, mean over seeds. First: accuracy, the bar is the mean of all. Then: differences to local "
    "training, with their mean and its 95 % interval."
)
INTERVALS = (
    "lines: 95 % t-intervals over seeds, where they go beyond the axis they are cut; filled dots: the interval leaves "
    "out zero, which of twenty clients without any gain one does by chance"
)


class Gains(NamedTuple):
    """A method's gain over local training, client by client, in points.

    Attributes:
        clients: in the order of the arrays.
        mean: over seeds.
        low, high: 95 % t-interval over seeds; NaN with one seed.
    """

    clients: list[str]
    mean: Float[np.ndarray, " clients"]
    low: Float[np.ndarray, " clients"]
    high: Float[np.ndarray, " clients"]


def draw_comparison(record: ComparisonRecord, target: Path) -> list[theme.Picture]:
    """Draw and save all methods, method × client, and the gains of clients."""
    label = find_measure(record.metric).label
    cells = f"Test {label} per client, %, mean over seeds; bold, or a dot: the best of a client."
    drawn = [("methods", METHODS, draw_methods(record)), ("clients", cells, draw_heatmap(record))]
    if gains := read_gains(record):
        intervals = INTERVALS if len(record.seeds) > 1 else "one seed only, so without intervals"
        caption = (
            f"What every client gains over local training, mean over seeds; {intervals}. Triangle and figure: the mean "
            "of all clients."
        )
        drawn.append(("gains", caption, draw_method_gains(gains, record.metric)))
    return [theme.save_picture(figure, target, name, caption) for name, caption, figure in drawn]


@theme.style()
def draw_methods(record: ComparisonRecord) -> Figure:
    """Draw all clients under each method, and how far each method is ahead of local training client by client."""
    scores = {method: record.scores(method) for method in ["zero-shot", *record.methods]}
    methods = [method for method in scores if scores[method]]
    dense = len(methods) > theme.MANY + 1
    methods = (order_by_mean(scores, methods) if dense else methods)[::-1]
    rival = "local" if scores.get("local") else methods[-1]
    height = 1.1 + (0.22 if dense else 0.52) * len(methods)
    figure, (left, right) = theme.make_figure(theme.WIDE, height, columns=2, sharey=True, width_ratios=(1.1, 1))
    series = theme.choose_series(record.methods)
    theirs = mean_over_seeds(scores[rival])
    size = 8 if dense else 9
    bar = {"markersize": 11, "markeredgewidth": 2} if dense else {"markersize": 20, "markeredgewidth": 2.6}
    for row, method in enumerate(methods):
        colour = theme.MUTED if method == "zero-shot" else theme.SERIES[series[method]]
        ours = mean_over_seeds(scores[method])
        _draw_cloud(left, row, 100 * np.asarray(list(ours.values())), colour, dense)
        mean = 100 * float(np.mean([np.mean(list(one.values())) for one in scores[method].values()]))
        left.plot(mean, row, "|", color=theme.INK, zorder=4, **bar)
        _write(left, row, mean, f"{mean:.1f}", dense)
        difference = compare_paired(scores[method], scores[rival])
        # Zero-shot lies far below: it would press all others against the edge.
        if method in (rival, "zero-shot") or difference is None:
            far = "" if difference is None else f"{points(difference.mean)}, not drawn"
            text, look = "the yardstick" if method == rival else far, {"color": theme.MUTED, "fontsize": size}
            theme.annotate(right, (0.02, row), text, ("axes fraction", "data"), (0, -3), "left", **look)
            continue
        ahead = [score - theirs[client] for client, score in ours.items() if client in theirs]
        _draw_cloud(right, row, 100 * np.asarray(ahead), colour, dense)
        centre = 100 * difference.mean
        ends = [[centre - 100 * difference.low], [100 * difference.high - centre]]
        if np.isfinite(ends).all():
            right.errorbar(centre, row, xerr=ends, color=theme.INK, capsize=2 if dense else 3, linewidth=1.6, zorder=4)
        right.plot(centre, row, "o", color=theme.INK, markersize=4 if dense else 6, zorder=5)
        _write(right, row, centre, points(difference.mean), dense)
    theme.name_rows(left, methods)
    left.set_ylim(-0.6, len(methods) - 0.3)
    left.set_xlabel(f"test {find_measure(record.metric).label}, %")
    right.axvline(0, color=theme.MUTED, linewidth=1)
    right.set_xlabel(f"points ahead of {rival}")
    return figure


def _draw_cloud(ax: Any, row: int, values: np.ndarray, colour: str, dense: bool) -> None:
    """Scatter values around a row. The jitter is a fixed pattern: the same report gives the same figure."""
    jitter = 0.13 * np.sin(2.4 * np.arange(len(values)))
    size = 8 if dense or len(values) > theme.LABELLED else 26
    ax.scatter(values, row - 0.08 + jitter, s=size, color=colour, alpha=0.6, linewidths=0)


def _write(ax: Any, row: int, value: float, text: str, dense: bool) -> None:
    """Write a value above its mark, or at the end of its row where there is no room between rows."""
    if dense:
        theme.annotate(ax, (1.01, row), text, ("axes fraction", "data"), (0, -3), "left", fontsize=8)
    else:
        theme.annotate(ax, (value, row), text, "data", (0, 11), "center")


def read_gains(record: ComparisonRecord) -> dict[str, Gains]:
    """Compute every method's gains over local training, the best method first; empty where local is not compared."""
    scores = {method: record.scores(method) for method in record.methods}
    base = scores.get(RIVALS[0])
    if not base:
        return {}
    gains = {}
    for method in order_by_mean(scores, [name for name in scores if scores[name] and name != RIVALS[0]]):
        found = []
        for client in sorted({client for one in scores[method].values() for client in one}):
            difference = compare_paired(_pick_client(scores[method], client), _pick_client(base, client))
            if difference is not None:
                found.append((client, 100 * difference.mean, 100 * difference.low, 100 * difference.high))
        if found:
            names, *numbers = zip(*found, strict=True)
            gains[method] = Gains(list(names), *(np.asarray(values) for values in numbers))
    return gains


def _pick_client(by_seed: Mapping[int, Mapping[str, float]], client: str) -> dict[int, dict[str, float]]:
    return {seed: {client: one[client]} for seed, one in by_seed.items() if client in one}


@theme.style()
def draw_method_gains(gains: Mapping[str, Gains], metric: str) -> Figure:
    """Draw a panel per method: a dot per client with its interval; filled where the interval leaves out zero."""
    clients = sorted({client for gain in gains.values() for client in gain.clients}, reverse=True)
    named, many = len(clients) <= theme.LABELLED, len(gains) > theme.MANY
    across = min(len(gains), 5 if many else 4)
    down = -(-len(gains) // across)
    row = (0.105 if many else 0.15) if named else 2.4 / len(clients)
    height = 0.5 + down * (0.55 + row * len(clients))
    figure, axes = theme.make_figure(theme.WIDE, height, columns=across, rows=down, sharex=True, sharey=True)
    size = 7 if many else 8.5
    for ax, (method, gain) in zip(axes, gains.items(), strict=False):
        rows = np.asarray([clients.index(client) for client in gain.clients])
        # Two seeds may agree by chance: an interval without a width says nothing.
        sure = ((gain.low > 0) | (gain.high < 0)) & (gain.high > gain.low)
        ax.axvline(0, color=theme.MUTED, linewidth=0.9)
        there = np.isfinite(gain.low)
        ax.hlines(rows[there], gain.low[there], gain.high[there], color=theme.MUTED, linewidth=1, zorder=2)
        for chosen, face in ((sure, theme.SERIES[0]), (~sure, theme.PAPER)):
            look: dict[str, Any] = {"s": 13 if many else 20, "facecolors": face, "edgecolors": theme.SERIES[0]}
            ax.scatter(gain.mean[chosen], rows[chosen], linewidths=1, zorder=3, **look)
        ax.plot(gain.mean.mean(), -1.0, "^", color=theme.INK, markersize=4, clip_on=False, zorder=4)
        ax.set_title(f"{method}  {points(gain.mean.mean() / 100)}", fontsize=size, pad=3)
        ax.tick_params(labelsize=size)
        ax.xaxis.get_major_locator().set_params(nbins=4)
    theme.hide_rest(axes, len(gains), across)
    theme.name_rows(axes[0], clients if named else [])
    reach = _find_reach(gains)
    axes[0].set(ylim=(-1.2, len(clients) - 0.4), xlim=(-reach, reach))
    figure.supxlabel(f"test {find_measure(metric).label}, points ahead of {RIVALS[0]}", fontsize=9, color=theme.MUTED)
    return figure


def _find_reach(gains: Mapping[str, Gains]) -> float:
    """Find the axis's reach to both sides: all means, and nine of ten ends of intervals; two seeds give huge ones."""
    means = max(float(np.abs(gain.mean).max()) for gain in gains.values())
    ends = np.concatenate([np.abs(side) for gain in gains.values() for side in (gain.low, gain.high)])
    ends = ends[np.isfinite(ends)]
    wide = float(np.quantile(ends, 0.9)) if len(ends) else 0.0
    return min(1.1 * max(means, min(wide, 2 * means), 1.0), 105.0)
