"""Tinted cells: method × client of a comparison, and every client's model × every client's data of a run."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedvlm_jax.evaluation.statistics.over_seeds import mean_over_seeds, order_by_mean
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord


@theme.style()
def draw_heatmap(record: ComparisonRecord) -> Figure:
    """Draw method × client, methods across; with many methods down, the best on top. The best of a client is bold."""
    scores = {method: record.scores(method) for method in ["zero-shot", *record.methods]}
    means = {method: mean_over_seeds(by_seed) for method, by_seed in scores.items() if by_seed}
    methods = list(means)
    clients = sorted(set.union(*map(set, means.values())), reverse=True)
    values = 100 * np.asarray([[means[method].get(client, np.nan) for method in methods] for client in clients])
    named = len(clients) <= theme.LABELLED
    if not named:  # in the order of the first trained method, so that the others can be read against it
        order = np.argsort(values[:, min(1, len(methods) - 1)], kind="stable")
        values, clients = values[order], [clients[place] for place in order]
    best = np.nanmax(values, axis=1, keepdims=True) == values
    names = clients if named else []
    if len(methods) > theme.MANY + 1:
        ranked = order_by_mean(scores, methods)[::-1]
        chosen = [methods.index(method) for method in ranked]
        figure = _draw_cells(values.T[chosen, ::-1], best.T[chosen, ::-1], ranked, names[::-1])
    else:
        figure = _draw_cells(values, best, names, methods)
    if not named:
        (ax,) = figure.axes
        ax.xaxis.set_label_position("top")
        (ax.set_xlabel if len(methods) > theme.MANY + 1 else ax.set_ylabel)(f"{len(clients)} clients")
    return figure


@theme.style()
def draw_matrix(record: RunRecord) -> Figure:
    """Draw the cross-client matrix of the metric that judges: data down, models across; own models lie on the diagonal.

    The best model for each client's data is bold.
    """
    stored = record.results["cross_clients"]
    clients = stored["clients"]
    values = 100 * np.asarray(stored[record.metric], float).T[::-1]  # the first client's data on top
    names = clients if len(clients) <= theme.LABELLED else []
    figure = _draw_cells(values, values == values.max(axis=1, keepdims=True), names[::-1], names)
    (ax,) = figure.axes
    ax.set_ylabel("data of")
    ax.set_xlabel("model of")
    ax.xaxis.set_label_position("top")
    ax.tick_params(axis="x", rotation=90)
    for place in range(len(clients)):
        corner = (place - 0.5, len(clients) - place - 1.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.INK, linewidth=0.9))
    return figure


def _draw_cells(
    values: Float[np.ndarray, "rows columns"],
    best: Bool[np.ndarray, "rows columns"],
    rows: list[str],
    columns: list[str],
) -> Figure:
    """Tint cells by value, in per cent, and write the values where rows and columns are few enough to have names.

    Where there is no room for values a dot marks the best instead of bold type.
    """
    count, across = values.shape
    turned = len(columns) > theme.MANY + 1
    figure, (ax,) = theme.make_figure(theme.WIDE, (1.6 if turned else 1.0) + (0.25 * count if rows else 6.0))
    top = max(float(np.nanmax(values)), 1.0)
    written = bool(rows) and bool(columns) and across <= 26
    wide, high = (0.96 if columns else 1.0), (0.92 if rows else 1.0)
    for row, column in np.argwhere(np.isfinite(values)).tolist():
        value = float(values[row, column])
        # Opacity instead of a colour map: the paper shines through, light or dark, and ink stays readable on it.
        tint: dict[str, Any] = {"facecolor": theme.SERIES[0], "alpha": 0.04 + 0.56 * value / top, "linewidth": 0}
        ax.add_patch(Rectangle((column - wide / 2, row - high / 2), wide, high, **tint))
        if written:
            weight = "bold" if best[row, column] else "normal"
            size = 8.5 if across <= 16 else 7.5
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, weight=weight)
        elif rows and best[row, column]:
            ax.plot(column, row, "o", color=theme.INK, markersize=3 if columns else 1.2)
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(columns)), [theme.fit_name(name, 40) for name in columns])
    ax.tick_params(axis="x", rotation=90 if turned else 0)
    theme.name_rows(ax, rows)
    ax.set_xlim(-0.5, across - 0.5)
    ax.set_ylim(-0.5, count - 0.5)
    return figure
