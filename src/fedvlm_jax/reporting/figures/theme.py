"""How pictures look: colours, figures, and SVG that follows the page's light or dark scheme.

A drawing takes its colours from a `Theme`. For PNG files they are colours. For the HTML page they are placeholders that
`to_svg` turns into CSS variables, so that one picture serves both schemes. Series colours are Okabe and Ito's, chosen
for all kinds of colour vision; series differ in their markers too.
"""

import html
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedvlm_jax.errors import naming

__all__ = [
    "BEFORE",
    "CSS_DARK",
    "CSS_LIGHT",
    "MANY",
    "PAPER",
    "PLACEHOLDERS",
    "Theme",
    "choose_series",
    "hide_rest",
    "make_figure",
    "save_png",
    "to_svg",
    "use_whole_numbers",
]

MARKERS = "osD^vPX*"
BEFORE = (0, (4, 2))
"""Dashes of what was there before redistribution, in every picture; what came after is solid."""

MANY = len(MARKERS)
"""Above so many methods colours and markers repeat, so that names have to stand beside what is drawn."""

FIRST_SERIES = ("local", "fedavg-lora", "fedavg-lora+ft", "plora")
"""Methods that keep their colour from one report to the next."""


@dataclass(frozen=True)
class Theme:
    """Colours by role."""

    ink: str
    muted: str
    grid: str
    paper: str
    series: tuple[str, ...]


PAPER = Theme(
    ink="#1b1f24",
    muted="#636b74",
    grid="#e3e6ea",
    paper="#ffffff",
    series=("#0072b2", "#d99100", "#009e73", "#d55e00", "#b3569a", "#3f9fd6", "#7a6a00", "#5b6570"),
)
DARK = Theme(
    ink="#e8eaed",
    muted="#9aa3ad",
    grid="#30363d",
    paper="#14171a",
    series=("#4fa9e6", "#f0b13c", "#2cc796", "#ff8143", "#e08cc8", "#8ccbf2", "#cbb84a", "#a9b3bd"),
)
# Colours that no drawing uses by chance; `to_svg` knows them again.
PLACEHOLDERS = Theme(
    ink="#fe0a01",
    muted="#fe0a02",
    grid="#fe0a03",
    paper="#fe0a04",
    series=tuple(f"#fe0b{number:02x}" for number in range(8)),
)


def _css_variables(theme: Theme) -> str:
    series = "".join(f"--s{number}:{colour};" for number, colour in enumerate(theme.series))
    return f"--ink:{theme.ink};--muted:{theme.muted};--grid:{theme.grid};--paper:{theme.paper};{series}"


CSS_LIGHT, CSS_DARK = _css_variables(PAPER), _css_variables(DARK)


def choose_series(methods: Sequence[str]) -> dict[str, int]:
    """Give each method the number of its colour and marker; the common methods always have the same."""
    taken = {FIRST_SERIES.index(method) for method in methods if method in FIRST_SERIES}
    free = itertools.cycle([number for number in range(8) if number not in taken] or [7])
    return {method: FIRST_SERIES.index(method) if method in FIRST_SERIES else next(free) for method in methods}


def make_figure(theme: Theme, width: float, height: float, columns: int = 1, rows: int = 1, **layout: Any) -> Any:
    """Make a figure without pyplot's global state and its axes, plain and in the theme's colours.

    Args:
        theme: the colours.
        width, height: in inches.
        columns, rows: how many axes.
        layout: what `Figure.subplots` takes besides.

    Returns:
        The figure and a list of axes, row by row.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **layout).flat)
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(theme.grid)
        ax.tick_params(colors=theme.muted, labelcolor=theme.ink, length=0, labelsize=9)
        ax.grid(axis="x", color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.title.set_color(theme.ink)
        ax.xaxis.label.set_color(theme.muted)
        ax.yaxis.label.set_color(theme.muted)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, axes


def hide_rest(axes: Sequence[Any], used: int, across: int) -> None:
    """Hide the axes of a grid that are not used; each column's lowest panel in use keeps its ticks' names."""
    for place, ax in enumerate(axes):
        if place >= used:
            ax.set_axis_off()
        elif place + across >= used:
            ax.tick_params(labelbottom=True)


def use_whole_numbers(ax: Any, most: int = 9) -> None:
    """Put ticks of the horizontal axis at whole numbers alone, at most so many; of one round that is one tick."""
    ax.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def save_png(figure: Figure, path: Path, theme: Theme = PAPER) -> None:
    """Save a picture for documents that take no SVG, on the theme's paper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        figure.savefig(path, dpi=160, facecolor=theme.paper, metadata={"Software": None})


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Turn a figure drawn with `PLACEHOLDERS` into SVG to be put into an HTML page.

    The same figure gives the same text each time. Nothing in it points outside the page.

    Args:
        figure: the picture.
        name: a prefix for its ids, which have to differ between the pictures of a page.
        label: what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedvlm"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is enough, and a third of the text is not
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px)[^;\"]*", r"font-size: \2", svg)
    for role in ("ink", "muted", "grid", "paper"):
        svg = svg.replace(getattr(PLACEHOLDERS, role), f"var(--{role})")
    for number, colour in enumerate(PLACEHOLDERS.series):
        svg = svg.replace(colour, f"var(--s{number})")
    # The size comes from the page; the view box keeps the proportions.
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg width="100%"', re.sub(r"<svg [^>]*>", _order_size, svg))
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()


def _order_size(tag: re.Match[str]) -> str:
    box = re.search(r'viewBox="[^"]*"', tag.group(0))
    return f'<svg width="" height="" {box.group(0) if box else ""}>'
