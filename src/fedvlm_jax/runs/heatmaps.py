"""Tinted cells: method × client of a comparison, and every client's model × every client's data of a run."""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedvlm_jax.runs.folders import ComparisonRecord, RunRecord
from fedvlm_jax.runs.plots import LABELLED, NARROW, WIDE, name_rows
from fedvlm_jax.runs.statistics import mean_over_seeds
from fedvlm_jax.runs.theme import Theme, make_figure

__all__ = ["draw_heatmap", "draw_matrix"]


def draw_heatmap(record: ComparisonRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw method × client, methods across; the best of each client is bold."""
    methods = ["zero-shot", *record.methods]
    means = {method: mean_over_seeds(record.scores(method)) for method in methods}
    methods = [method for method in methods if means[method]]
    clients = sorted(set.union(*(set(means[method]) for method in methods)), reverse=True)
    values = 100 * np.asarray([[means[method].get(client, np.nan) for method in methods] for client in clients])
    named = len(clients) <= LABELLED
    if not named:  # in the order of the first trained method, so that the others can be read against it
        order = np.argsort(values[:, min(1, len(methods) - 1)], kind="stable")
        values = values[order]
    names = [method.replace("-", "-\n", 1).replace("+", "\n+") if narrow else method for method in methods]
    figure = _draw_cells(values, clients if named else [], names, np.nanmax(values, axis=1), theme, narrow)
    if not named:
        figure.axes[0].set_ylabel(f"{len(clients)} clients")
    return figure


def draw_matrix(record: RunRecord, theme: Theme, narrow: bool = False) -> Figure:
    """Draw the cross-client matrix of the metric that judges: data down, models across; own models lie on the diagonal.

    The best model for each client's data is bold.
    """
    stored = record.results["cross_clients"]
    clients = stored["clients"]
    values = 100 * np.asarray(stored[record.metric], float).T[::-1]  # the first client's data on top
    names = clients if len(clients) <= LABELLED else []
    figure = _draw_cells(values, names[::-1], names, values.max(axis=1), theme, narrow)
    ax = figure.axes[0]
    ax.set_ylabel("data of")
    ax.set_xlabel("model of")
    ax.xaxis.set_label_position("top")
    for tick in ax.get_xticklabels():
        tick.set(rotation=90)
    for place in range(len(clients)):
        corner = (place - 0.5, len(clients) - place - 1.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.ink, linewidth=0.9))
    return figure


def _draw_cells(
    values: Float[np.ndarray, "rows columns"],
    rows: list[str],
    columns: list[str],
    best: Float[np.ndarray, " rows"],
    theme: Theme,
    narrow: bool,
) -> Figure:
    """Tint cells by value, in per cent; without names of rows there are too many for figures."""
    named, count = bool(rows), len(values)
    figure, (ax,) = make_figure(theme, NARROW if narrow else WIDE, 1.0 + (0.25 * count if named else 6.0))
    top = max(float(np.nanmax(values)), 1.0)
    written = named and not (narrow and values.shape[1] > 8)
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if np.isnan(value):
            continue
        # Opacity instead of a colour map: the paper shines through, light or dark, and ink stays readable on it.
        place = (column - 0.48, row - 0.46 if named else row - 0.5)
        size = (0.96, 0.92 if named else 1.0)
        ax.add_patch(_tint(place, size, theme.series[0], 0.04 + 0.56 * float(value) / top))
        if written:
            weight = "bold" if value == best[row] else "normal"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8.5, color=theme.ink, weight=weight)
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(columns)), columns, fontsize=8 if narrow else 9, parse_math=False)
    name_rows(ax, rows)
    ax.set_xlim(-0.5, values.shape[1] - 0.5)
    ax.set_ylim(-0.5, count - 0.5)
    return figure


def _tint(place: tuple[float, float], size: tuple[float, float], colour: str, opacity: float) -> Any:
    return Rectangle(place, *size, facecolor=colour, alpha=opacity, linewidth=0)
