"""What sharing is worth to each client: a small panel per method, client by client against the yardstick."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, order_by_mean
from fedvlm_jax.reporting.figures.run_figures import LABELLED, NARROW, WIDE, name_rows
from fedvlm_jax.reporting.figures.theme import MANY, Theme, hide_rest, make_figure
from fedvlm_jax.reporting.tables import RIVALS, points
from fedvlm_jax.training.run_dir.reader import ComparisonRecord

__all__ = ["Gains", "draw_method_gains", "read_gains"]

YARDSTICK = RIVALS[0]


class Gains(NamedTuple):
    """A method's gain over the yardstick, client by client, in points.

    Attributes:
        clients: in the order of the arrays.
        mean: over seeds.
        low, high: 95 % t-interval over seeds; NaN with one seed.
    """

    clients: list[str]
    mean: Float[np.ndarray, " clients"]
    low: Float[np.ndarray, " clients"]
    high: Float[np.ndarray, " clients"]


def read_gains(record: ComparisonRecord) -> dict[str, Gains]:
    """Every method's gains over local training, the best method first; empty where local is not compared."""
    scores = {method: record.scores(method) for method in record.methods}
    base = scores.get(YARDSTICK)
    if not base:
        return {}
    gains = {}
    for method in order_by_mean(scores, [name for name in scores if scores[name] and name != YARDSTICK]):
        clients = sorted({client for one in scores[method].values() for client in one})
        found = []
        for client in clients:
            ours, theirs = (
                {seed: {client: one[client]} for seed, one in by_seed.items() if client in one}
                for by_seed in (scores[method], base)
            )
            difference = compare_paired(ours, theirs)
            if difference is not None:
                found.append((client, 100 * difference.mean, 100 * difference.low, 100 * difference.high))
        if found:
            names, *numbers = zip(*found, strict=True)
            gains[method] = Gains(list(names), *(np.asarray(values) for values in numbers))
    return gains


def draw_method_gains(gains: dict[str, Gains], metric: str, theme: Theme, narrow: bool = False) -> Figure:
    """Draw a panel per method: a dot per client with its interval; filled where the interval leaves out zero."""
    clients = sorted({client for own in gains.values() for client in own.clients}, reverse=True)
    place = {client: row for row, client in enumerate(clients)}
    named, many = len(clients) <= LABELLED, len(gains) > MANY
    across = min(len(gains), (3 if many else 2) if narrow else (5 if many else 4))
    down = -(-len(gains) // across)
    row = (0.105 if many else 0.15) if named else 2.4 / len(clients)
    figure, axes = make_figure(
        theme, NARROW if narrow else WIDE, 0.5 + down * (0.55 + row * len(clients)), columns=across, rows=down,
        sharex=True, sharey=True,
    )  # fmt: skip
    size = (6.5 if many else 7.5) if narrow else (7 if many else 8.5)
    reach = _find_reach(gains)
    for ax, (method, own) in zip(axes, gains.items(), strict=False):
        rows = np.asarray([place[client] for client in own.clients])
        # Two seeds may agree by chance: an interval without a width says nothing.
        sure = ((own.low > 0) | (own.high < 0)) & (own.high > own.low)
        ax.axvline(0, color=theme.muted, linewidth=0.9)
        there = np.isfinite(own.low)
        ax.hlines(rows[there], own.low[there], own.high[there], color=theme.muted, linewidth=1, zorder=2)
        for chosen, face in ((sure, theme.series[0]), (~sure, theme.paper)):
            ax.scatter(
                own.mean[chosen], rows[chosen], s=13 if many else 20, facecolors=face, edgecolors=theme.series[0],
                linewidths=1, zorder=3,
            )  # fmt: skip
        ax.plot(own.mean.mean(), -1.0, "^", color=theme.ink, markersize=4, clip_on=False, zorder=4)
        heading = (
            f"{method}\n{points(own.mean.mean() / 100)}" if narrow else f"{method}  {points(own.mean.mean() / 100)}"
        )
        ax.set_title(heading, fontsize=size, loc="left", color=theme.ink, pad=3, parse_math=False)
        ax.tick_params(labelsize=size)
        ax.xaxis.get_major_locator().set_params(nbins=4)
    hide_rest(axes, len(gains), across)
    name_rows(axes[0], clients if named else [])
    axes[0].set_ylim(-1.2, len(clients) - 0.4)
    axes[0].set_xlim(-reach, reach)
    figure.supxlabel(f"test {find_measure(metric).label}, points ahead of {YARDSTICK}", fontsize=9, color=theme.muted)
    return figure


def _find_reach(gains: dict[str, Gains]) -> float:
    """How far the axis goes to both sides: all means, and nine of ten ends of intervals; two seeds give huge ones."""
    means = max(float(np.abs(own.mean).max()) for own in gains.values())
    ends = np.concatenate([np.abs(side) for own in gains.values() for side in (own.low, own.high)])
    ends = ends[np.isfinite(ends)]
    wide = float(np.quantile(ends, 0.9)) if len(ends) else 0.0
    return min(1.1 * max(means, min(wide, 2 * means), 1.0), 105.0)
