"""The heat map of every client's model on every client's data."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.run_dir.reader import RunRecord


@theme.style()
def draw_matrix(record: RunRecord) -> Figure:
    """Draw the cross-client matrix of the metric that judges: data down, models across, the diagonal framed.

    The best model for each client's data is bold.
    """
    stored = record.results["cross_clients"]
    clients = stored["clients"]
    values = 100 * np.asarray(stored[record.metric], float).T[::-1]  # the first client's data on top
    names = clients if len(clients) <= theme.LABELLED else []
    figure = theme.tint_cells(values, values == values.max(axis=1, keepdims=True), names[::-1], names)
    (ax,) = figure.axes
    ax.set(xlabel="model of", ylabel="data of")
    ax.xaxis.set_label_position("top")
    ax.tick_params(axis="x", rotation=90)
    for place in range(len(clients)):
        corner = (place - 0.5, len(clients) - place - 1.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.INK, linewidth=0.9))
    return figure
