"""Tinted cells: method × client of a comparison, and every client's model × every client's data of a run."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedvlm_jax.evaluation.statistics.over_seeds import mean_over_seeds, order_by_mean
from fedvlm_jax.reporting.figures.fonts import fit_name
from fedvlm_jax.reporting.figures.run_figures import LABELLED, NARROW, WIDE, name_rows
from fedvlm_jax.reporting.figures.theme import MANY, Theme, make_figure
from fedvlm_jax.training.run_dir.reader import ComparisonRecord, RunRecord

__all__ = ["draw_heatmap", "draw_matrix"]


def draw_heatmap(record: ComparisonRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw method × client, methods across; with many methods down, the best on top. The best of a client is bold."""
    methods = ["zero-shot", *record.methods]
    scores = {method: record.scores(method) for method in methods}
    methods = [method for method in methods if scores[method]]
    means = {method: mean_over_seeds(scores[method]) for method in methods}
    clients = sorted(set.union(*(set(means[method]) for method in methods)), reverse=True)
    values = 100 * np.asarray([[means[method].get(client, np.nan) for method in methods] for client in clients])
    named = len(clients) <= LABELLED
    if not named:  # in the order of the first trained method, so that the others can be read against it
        order = np.argsort(values[:, min(1, len(methods) - 1)], kind="stable")
        values, clients = values[order], [clients[place] for place in order]
    best = np.nanmax(values, axis=1, keepdims=True) == values
    if len(methods) > MANY + 1:
        ranked = order_by_mean(scores, methods)[::-1]
        chosen = [methods.index(method) for method in ranked]
        columns = clients[::-1] if named else []
        figure = _draw_cells(values.T[chosen, ::-1], best.T[chosen, ::-1], ranked, columns, theme, narrow)
        axis = figure.axes[0].set_xlabel
        figure.axes[0].xaxis.set_label_position("top")
    else:
        names = [method.replace("-", "-\n", 1).replace("+", "\n+") if narrow else method for method in methods]
        figure = _draw_cells(values, best, clients if named else [], names, theme, narrow)
        axis = figure.axes[0].set_ylabel
    if not named:
        axis(f"{len(clients)} clients")
    return figure


def draw_matrix(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw the cross-client matrix of the metric that judges: data down, models across; own models lie on the diagonal.

    The best model for each client's data is bold.
    """
    stored = record.results["cross_clients"]
    clients = stored["clients"]
    values = 100 * np.asarray(stored[record.metric], float).T[::-1]  # the first client's data on top
    names = clients if len(clients) <= LABELLED else []
    best = values == values.max(axis=1, keepdims=True)
    figure = _draw_cells(values, best, names[::-1], names, theme, narrow)
    ax = figure.axes[0]
    ax.set_ylabel("data of")
    ax.set_xlabel("model of")
    ax.xaxis.set_label_position("top")
    ax.tick_params(axis="x", rotation=90)
    for place in range(len(clients)):
        corner = (place - 0.5, len(clients) - place - 1.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.ink, linewidth=0.9))
    return figure


def _draw_cells(
    values: Float[np.ndarray, "rows columns"],
    best: Bool[np.ndarray, "rows columns"],
    rows: list[str],
    columns: list[str],
    theme: Theme,
    narrow: bool,
) -> Figure:
    """Tint cells by value, in per cent; without names of rows there are too many for figures, and of columns likewise.

    Where there is no room for figures a dot marks the best instead of bold type.
    """
    named, count = bool(rows), len(values)
    turned = len(columns) > MANY + 1
    height = 0.25 * count if named else 6.0
    figure, (ax,) = make_figure(theme, NARROW if narrow else WIDE, (1.6 if turned else 1.0) + height)
    top = max(float(np.nanmax(values)), 1.0)
    written = named and bool(columns) and values.shape[1] <= (MANY if narrow else 26)
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if np.isnan(value):
            continue
        # Opacity instead of a colour map: the paper shines through, light or dark, and ink stays readable on it.
        wide, high = (0.96 if columns else 1.0), (0.92 if named else 1.0)
        place = (column - wide / 2, row - high / 2)
        ax.add_patch(_tint(place, (wide, high), theme.series[0], 0.04 + 0.56 * float(value) / top))
        if written:
            weight = "bold" if best[row, column] else "normal"
            size = 8.5 if values.shape[1] <= 16 else 7.5
            ax.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=theme.ink, weight=weight
            )
        elif named and best[row, column]:
            ax.plot(column, row, "o", color=theme.ink, markersize=3 if columns else 1.2)
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(columns)), [fit_name(name, 40) for name in columns], parse_math=False)
    ax.tick_params(axis="x", labelsize=8 if narrow else 9, rotation=90 if turned else 0)
    name_rows(ax, rows)
    ax.tick_params(axis="y", labelsize=7.5 if narrow and turned else 9)
    ax.set_xlim(-0.5, values.shape[1] - 0.5)
    ax.set_ylim(-0.5, count - 0.5)
    return figure


def _tint(place: tuple[float, float], size: tuple[float, float], colour: str, opacity: float) -> Any:
    return Rectangle(place, *size, facecolor=colour, alpha=opacity, linewidth=0)
