"""The figures of a comparison's scores: all methods side by side, method × client, and the gains of clients.

With more than eight methods, rows and small panels carry the names, and methods are ordered by their mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, mean_over_seeds, order_by_mean
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.score_tables import RIVALS, read_scores
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.run_dir.reader import ComparisonRecord


class Gains(NamedTuple):
    """A method's gain over local training, client by client, in points: its mean over seeds and its 95 % t-interval.

    The interval is NaN with one seed.
    """

    clients: list[str]
    mean: Float[np.ndarray, " clients"]
    low: Float[np.ndarray, " clients"]
    high: Float[np.ndarray, " clients"]


def draw_comparison(record: ComparisonRecord, target: Path) -> list[theme.Picture]:
    """Draw and save all methods, method × client, and the gains of clients."""
    captions = theme.CAPTIONS["comparison"]
    cells = captions["clients"].format(label=find_measure(record.metric).label)
    pictures = [
        theme.save_picture(draw_methods(record), target, "methods", captions["methods"]),
        theme.save_picture(draw_heatmap(record), target, "clients", cells),
    ]
    if gains := read_gains(record):
        caption = captions["gains" if len(record.seeds) > 1 else "gains_of_one_seed"]
        pictures.append(theme.save_picture(draw_method_gains(gains, record.metric), target, "gains", caption))
    return pictures


@theme.style()
def draw_methods(record: ComparisonRecord) -> Figure:
    """Draw all clients under each method, and how far each method is ahead of local training client by client."""
    scores = read_scores(record)
    dense = len(scores) > theme.MANY + 1
    methods = (order_by_mean(scores, list(scores)) if dense else list(scores))[::-1]
    rival = "local" if "local" in scores else methods[-1]
    height = 1.1 + (0.22 if dense else 0.52) * len(methods)
    figure, (left, right) = theme.make_figure(theme.WIDE, height, columns=2, sharey=True, width_ratios=(1.1, 1))
    series = theme.choose_series(record.methods)
    theirs = mean_over_seeds(scores[rival])
    bar = {"markersize": 11, "markeredgewidth": 2} if dense else {"markersize": 20, "markeredgewidth": 2.6}
    for row, method in enumerate(methods):
        colour = theme.MUTED if method == "zero-shot" else theme.SERIES[series[method]]
        ours = mean_over_seeds(scores[method])
        _draw_cloud(left, row, 100 * np.asarray(list(ours.values())), colour, dense)
        mean = 100 * float(np.mean([np.mean(list(by_client.values())) for by_client in scores[method].values()]))
        left.plot(mean, row, "|", color=theme.INK, zorder=4, **bar)
        _write(left, row, mean, f"{mean:.1f}", dense)
        difference = compare_paired(scores[method], scores[rival])
        # Zero-shot lies far below: it would press all others against the edge.
        if method in (rival, "zero-shot") or difference is None:
            far = "" if difference is None else f"{points(difference.mean)}, not drawn"
            text, look = "the yardstick" if method == rival else far, {"fontsize": 8 if dense else 9}
            frame = ("axes fraction", "data")
            theme.annotate(right, (0.02, row), text, frame, (0, -3), "left", color=theme.MUTED, **look)
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
    left.set(ylim=(-0.6, len(methods) - 0.3), xlabel=f"test {find_measure(record.metric).label}, %")
    right.axvline(0, color=theme.MUTED, linewidth=1)
    right.set_xlabel(f"points ahead of {rival}")
    return figure


def _draw_cloud(ax: Any, row: int, values: np.ndarray, colour: str, dense: bool) -> None:
    jitter = 0.13 * np.sin(2.4 * np.arange(len(values)))  # no random one: the same report gives the same figure
    size = 8 if dense or len(values) > theme.LABELLED else 26
    ax.scatter(values, row - 0.08 + jitter, s=size, color=colour, alpha=0.6, linewidths=0)


def _write(ax: Any, row: int, value: float, text: str, dense: bool) -> None:
    """Write a value above its mark, or at the end of its row where there is no room between rows."""
    if dense:
        theme.annotate(ax, (1.01, row), text, ("axes fraction", "data"), (0, -3), "left", fontsize=8)
    else:
        theme.annotate(ax, (value, row), text, "data", (0, 11), "center")


@theme.style()
def draw_heatmap(record: ComparisonRecord) -> Figure:
    """Draw method × client, methods across; with many methods down, the best on top. The best of a client is bold."""
    scores = read_scores(record)
    means = {method: mean_over_seeds(by_seed) for method, by_seed in scores.items()}
    methods = list(means)
    clients = sorted(set.union(*map(set, means.values())), reverse=True)
    values = 100 * np.asarray([[means[method].get(client, np.nan) for method in methods] for client in clients])
    named, many = len(clients) <= theme.LABELLED, len(methods) > theme.MANY + 1
    if not named:  # in the order of the first trained method, so that the others can be read against it
        values = values[np.argsort(values[:, min(1, len(methods) - 1)], kind="stable")]
    best = np.nanmax(values, axis=1, keepdims=True) == values
    names = clients if named else []
    if many:
        ranked = order_by_mean(scores, methods)[::-1]
        chosen = [methods.index(method) for method in ranked]
        figure = theme.tint_cells(values.T[chosen, ::-1], best.T[chosen, ::-1], ranked, names[::-1])
    else:
        figure = theme.tint_cells(values, best, names, methods)
    if not named:
        (ax,) = figure.axes
        ax.xaxis.set_label_position("top")
        (ax.set_xlabel if many else ax.set_ylabel)(format_count(len(clients), "client"))
    return figure


def read_gains(record: ComparisonRecord) -> dict[str, Gains]:
    """Compute every method's gains over local training, the best method first; empty where local is not compared."""
    scores = read_scores(record)
    local = scores.get(RIVALS[0])
    if not local:
        return {}
    gains = {}
    for method in order_by_mean(scores, [name for name in scores if name not in ("zero-shot", RIVALS[0])]):
        found = []
        for client in sorted({client for by_client in scores[method].values() for client in by_client}):
            ours, theirs = (
                {seed: {client: by_client[client]} for seed, by_client in by_seed.items() if client in by_client}
                for by_seed in (scores[method], local)
            )
            difference = compare_paired(ours, theirs)
            if difference is not None:
                found.append((client, 100 * difference.mean, 100 * difference.low, 100 * difference.high))
        if found:
            names, *numbers = zip(*found, strict=True)
            gains[method] = Gains(list(names), *(np.asarray(values) for values in numbers))
    return gains


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
        finite = np.isfinite(gain.low)
        ax.hlines(rows[finite], gain.low[finite], gain.high[finite], color=theme.MUTED, linewidth=1, zorder=2)
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
