"""The figure of a federation: how many rows each client has, and of what.

Few clients are rows with their names, the largest first. Many are thin columns without, so that a hundred or a thousand
fit one page; there each panel has its order: by size, and by what a client has most of. Clients that never train stand
apart, after the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.errors import format_count
from fedvlm_jax.reporting.figures import theme

WIDTH = 9.6
NAMED = 40  # above so many clients they are columns without names
COLOURED = 7  # values of a key that have a colour each; the others share a grey
# Where the largest of many clients has more than so many times the rows of the median one, rows are on a log scale.
SKEWED = 30
# Splits are one ink at three strengths, which leaves the colours to the values.
STRENGTHS = {"train": 0.85, "validation": 0.2, "test": 0.5}
Clients = Sequence[Mapping[str, Any]]
# What bars are stacked of: name -> its size at every client, and its colour.
Parts = Mapping[str, tuple[np.ndarray, tuple[float, ...]]]


@theme.style()
def draw_data(description: Mapping[str, Any]) -> Figure:
    """Draw a description (of `data.dataset_summary.describe`): rows by split, and shares of the values of its label."""
    clients = sorted(description["clients"], key=lambda each: (each["held_out"], -_count_rows(each), each["name"]))
    found = description["keys"].get(description["label"])
    named, panels = len(clients) <= NAMED, 2 if found else 1
    gap = (0.6 if named else max(1.0, 0.02 * len(clients))) if clients[-1]["held_out"] else 0.0
    if named:
        figure, axes = theme.make_figure(WIDTH, 1.7 + 0.25 * (len(clients) + gap), columns=panels, sharey=True)
    else:
        figure, axes = theme.make_figure(WIDTH, 2.7 * panels + 0.3, rows=panels, sharex=True)
    at = np.arange(len(clients)) + np.asarray([gap if client["held_out"] else 0.0 for client in clients])
    (_draw_named_rows if named else _draw_many_rows)(axes[0], at, clients)
    if found:
        title = f"Share of their rows by {description['label']}"
        _stack(axes[1], at, _share_values(clients, found, named), named)
        _head(axes[1], title if named else f"{title}, like beside like", named)
        (axes[1].set_xlim if named else axes[1].set_ylim)(0, 100)
        (axes[1].xaxis if named else axes[1].yaxis).set_major_formatter("{x:.0f} %")
    if not named:
        for ax in axes:
            ax.grid(visible=False, axis="x")
            ax.grid(axis="y")
            ax.set(xticks=[], xlim=(-0.8, at.max() + 0.8))
        out = sum(client["held_out"] for client in clients)
        axes[-1].set_xlabel(
            format_count(len(clients), "client") + (f", on the right the {out} that are held out" if out else "")
        )
    return figure


def _count_rows(client: Mapping[str, Any]) -> int:
    return sum(client[split] for split in SPLITS)


def _draw_named_rows(ax: Any, at: np.ndarray, clients: Clients) -> None:
    _stack(ax, at, _split_rows(clients), named=True)
    names = [theme.fit_name(client["name"], 34) + (" (held out)" if client["held_out"] else "") for client in clients]
    ax.set_yticks(at, names)
    ax.set_ylim(at.max() + 0.6, -0.6)
    sums = [_count_rows(client) for client in clients]
    look = {"va": "center", "fontsize": 8.5, "color": theme.MUTED}
    for place, number in zip(at, sums, strict=True):
        theme.annotate(ax, (number, place), f"{number:,}", "data", (4, 0), "left", **look)
    ax.set_xlim(0, 1.12 * max(1, *sums))
    theme.use_whole_numbers(ax, 6)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    _head(ax, "Rows of each client", True)


def _draw_many_rows(ax: Any, at: np.ndarray, clients: Clients) -> None:
    sums = np.asarray([_count_rows(client) for client in clients])
    skewed = sums.max() > SKEWED * max(1.0, float(np.median(sums)))
    parts = _split_rows(clients)
    if skewed:  # a stack has no meaning on a log scale
        parts = {"all splits": (sums.astype(float), parts["train"][1])}
    _stack(ax, at, parts, named=False)
    if skewed:
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.8)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.minorticks_off()
    text = f"largest {sums.max():,} · median {np.median(sums):,.0f} · smallest {sums.min():,}"
    theme.annotate(ax, (1, 1), text, "axes fraction", (0, 6), "right", color=theme.MUTED)
    _head(ax, f"Rows of each client{' (log scale)' if skewed else ''}, the largest first", False)


def _split_rows(clients: Clients) -> Parts:
    return {
        str(split): (np.asarray([client[split] for client in clients], float), thin(theme.INK, STRENGTHS[split]))
        for split in SPLITS
    }


def _share_values(clients: Clients, found: Mapping[str, Any], named: bool) -> Parts:
    """Compute what per cent of every client's rows has each of the commonest values, and the others together.

    Clients without names are put side by side that have most of the same value, those that have most of it first.
    """
    values = list(found["values"])
    shown = values if len(values) <= COLOURED + 1 else values[:COLOURED]
    held = [found["by_client"][client["name"]] for client in clients]
    totals = np.maximum(1, np.asarray([sum(counts.values()) for counts in held], float))
    shares = {value: 100 * np.asarray([counts.get(value, 0) for counts in held]) / totals for value in shown}
    colours = {value: thin(theme.SERIES[place], 0.9) for place, value in enumerate(shown)}
    if len(values) > len(shown):
        full = np.asarray([100.0 if counts else 0.0 for counts in held])
        name = f"{format_count(len(values) - len(shown), 'other')}"
        shares[name] = full - sum(shares.values())
        colours[name] = thin(theme.MUTED, 0.35)
    order = np.arange(len(clients))
    if not named:
        table = np.stack(list(shares.values()))
        held_out = np.asarray([client["held_out"] for client in clients])
        # The last key counts first: held-out clients, then those without rows, stand at the right.
        order = np.lexsort((-table.max(axis=0), table.argmax(axis=0), table.sum(axis=0) == 0, held_out))
    return {value: (share[order], colours[value]) for value, share in shares.items()}


def _stack(ax: Any, at: np.ndarray, parts: Parts, named: bool) -> None:
    base = np.zeros(len(at))
    # A hairline of paper between named clients; hundreds of columns would drown in it.
    width = 0.8 if named else 0.9 if len(at) <= 150 else 1.0
    for name, (sizes, colour) in parts.items():
        look: dict[str, Any] = {"color": colour, "linewidth": 0, "label": name}
        if named:
            ax.barh(at, sizes, width, left=base, **look)
        else:
            ax.bar(at, sizes, width, bottom=base, **look)
        base = base + sizes


def _head(ax: Any, title: str, named: bool) -> None:
    """Write a title above the bars, and what their colours mean."""
    handles = list(ax.containers)
    names = [theme.fit_name(handle.get_label(), 30) for handle in handles]
    # A column of the legend is as wide as its longest name; half the figure holds some 60 letters, all of it 130.
    columns = max(1, min(len(names), (60 if named else 130) // (max(map(len, names)) + 6)))
    # matplotlib takes a name that begins with an underscore for one to be hidden.
    names = [f" {name}" if name.startswith("_") else name for name in names]
    bold = FontProperties(size=10.5, weight="bold")
    place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "alignment": "left", "ncols": columns}
    gaps = {"borderpad": 0.2, "columnspacing": 1.4, "handlelength": 0.9, "handleheight": 0.9, "handletextpad": 0.5}
    ax.legend(handles, names, title=title, title_fontproperties=bold, **place, **gaps)


def thin(colour: str, strength: float) -> tuple[float, ...]:
    """Lay a colour thinly on paper: opaque, unlike one with opacity, so that no grid shines through.

    >>> thin("#000000", 0.25)
    (0.75, 0.75, 0.75)
    """
    over, under = np.asarray(to_rgb(colour)), np.asarray(to_rgb(theme.PAPER))
    return tuple((strength * over + (1 - strength) * under).tolist())
