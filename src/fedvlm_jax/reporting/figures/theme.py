"""The look of figures: colours, fonts, names of any length and script, and how a figure becomes a PNG file and SVG.

A figure is drawn once. In its SVG the colours of the palette become CSS variables of the page, so that it follows the
page's light or dark scheme. `templates/figures.toml` has the look and the captions.
"""

import io
import itertools
import re
import tomllib
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from markupsafe import Markup
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator
from rich.cells import cell_len

from fedvlm_jax.errors import naming
from fedvlm_jax.utils.untrusted_text import clean

LOOK: dict[str, Any] = tomllib.loads((Path(__file__).parents[1] / "templates" / "figures.toml").read_text("utf-8"))
PALETTE: dict[str, tuple[str, str]] = LOOK["palette"]
CAPTIONS: dict[str, dict[str, str]] = LOOK["captions"]
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
STYLE: dict[Any, Any] = {name: COLOURS.get(value, value) for name, value in LOOK["style"].items()}
INK, MUTED, GRID, PAPER, *_SERIES = COLOURS.values()
SERIES = tuple(_SERIES)
MARKERS = "osD^vPX*"
BEFORE = (0, (4, 2))  # dashes of validation before redistribution, in every figure; what came after is solid
LEVEL, DOTTED = (0, (4, 3)), (0, (1, 2))  # dashes of means and other levels, and dots of what is only a reference
MANY = len(MARKERS)  # above so many methods their colours and markers repeat, so names stand beside what is drawn
LABELLED = 48  # above so many clients their names are left out of figures
WIDE = 7.6  # width of a page's figures in inches
# Methods that keep their colour from one report to the next.
FIRST_SERIES = ("local", "fedavg-lora", "fedavg-lora+ft", "plora")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure on a page: its SVG; `figures/<name>.png` is the same for documents that take no SVG."""

    name: str
    caption: str
    svg: Markup


class Name(NamedTuple):
    """A name for the point (x, y) in data units; a strong one is bold."""

    text: str
    x: float
    y: float
    strong: bool = False


@cache
def _list_families() -> tuple[str, ...]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in LOOK["fallback_fonts"] if name in installed))


@contextmanager
def style() -> Generator[None]:
    """Draw and save in this look, with fonts for as many scripts as the machine has."""
    with mpl.rc_context({**STYLE, "font.family": list(_list_families())}):
        yield


def choose_series(methods: Sequence[str]) -> dict[str, int]:
    """Give each method the number of its colour and marker; the common methods always have the same.

    >>> choose_series(["fedsa", "plora", "ditto"])
    {'fedsa': 0, 'plora': 3, 'ditto': 1}
    """
    taken = {FIRST_SERIES.index(method) for method in methods if method in FIRST_SERIES}
    free = itertools.cycle([number for number in range(8) if number not in taken] or [7])
    return {method: FIRST_SERIES.index(method) if method in FIRST_SERIES else next(free) for method in methods}


def make_figure(width: float, height: float, columns: int = 1, rows: int = 1, **layout: Any) -> Any:
    """Make a figure of so many inches without pyplot's global state; return it and a list of its axes, row by row."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).flat)


def hide_rest(axes: Sequence[Any], used: int, across: int) -> None:
    """Hide the axes of a grid that are not used; each column's lowest panel in use keeps its ticks' names."""
    for place, ax in enumerate(axes):
        if place >= used:
            ax.set_axis_off()
        elif place + across >= used:
            ax.tick_params(labelbottom=True)


def use_whole_numbers(ax: Any, most: int = 9) -> None:
    """Put ticks of the horizontal axis at whole numbers alone."""
    # At least one, for there may be a single round.
    ax.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def fit_name(name: str, width: int) -> str:
    r"""Write a name on one line of at most `width` Latin letters (a Chinese one takes the room of two).

    The middle of a long name is left out, for names differ at both ends; what is not seen is written as an escape.

    >>> fit_name("hospital of the north, ward 7", 16)
    'hospital… ward 7'
    >>> fit_name("a\x1b[2J", 16)
    'a\\x1b[2J'
    """
    name = clean(" ".join(name.split()))
    if cell_len(name) <= width:
        return name
    kept = len(name)
    while cell_len(short := f"{name[: -(-kept // 2)]}…{name[len(name) - kept // 2 :]}") > width and kept:
        kept -= 1
    return short


def name_rows(ax: Any, names: Sequence[str]) -> None:
    """Write names beside the rows, in two fifths of the figure at most."""
    width = int(5.5 * ax.figure.get_figwidth())
    ax.set_yticks(range(len(names)), [fit_name(name, width) for name in names])


def tint_cells(
    values: Float[np.ndarray, "rows columns"],
    best: Bool[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
) -> Figure:
    """Tint cells by value, in per cent; rows or columns that are too many to be named have no names.

    Where there is room the values are written, the best in bold; else a dot marks the best.
    """
    count, across = values.shape
    turned = len(columns) > MANY + 1
    figure, (ax,) = make_figure(WIDE, (1.6 if turned else 1.0) + (0.25 * count if rows else 6.0))
    top = max(float(np.nanmax(values)), 1.0)
    written = bool(rows) and bool(columns) and across <= 26
    wide, high = (0.96 if columns else 1.0), (0.92 if rows else 1.0)
    for row, column in np.argwhere(np.isfinite(values)).tolist():
        value = float(values[row, column])
        # Opacity instead of a colour map: the paper shines through, light or dark, and ink stays readable on it.
        tint: dict[str, Any] = {"facecolor": SERIES[0], "alpha": 0.04 + 0.56 * value / top, "linewidth": 0}
        ax.add_patch(Rectangle((column - wide / 2, row - high / 2), wide, high, **tint))
        if written:
            weight = "bold" if best[row, column] else "normal"
            size = 8.5 if across <= 16 else 7.5
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, weight=weight)
        elif rows and best[row, column]:
            ax.plot(column, row, "o", color=INK, markersize=3 if columns else 1.2)
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(columns)), [fit_name(name, 40) for name in columns])
    ax.tick_params(axis="x", rotation=90 if turned else 0)
    name_rows(ax, rows)
    ax.set(xlim=(-0.5, across - 0.5), ylim=(-0.5, count - 0.5))
    return figure


def annotate(
    ax: Any, at: tuple[float, float], text: str, frame: Any, shift: tuple[int, int], align: str, **look: Any
) -> None:
    """Write a text beside a place in the coordinates `frame`, moved by `shift` points."""
    look = {"fontsize": 9, "xycoords": frame, "textcoords": "offset points", "ha": align, **look}
    ax.annotate(text, at, xytext=shift, **look)


def spread_apart(heights: Sequence[float], gap: float) -> Float[np.ndarray, " names"]:
    """Move rising heights within 0 … 1 until neighbours are `gap` apart, or as far as there is room.

    >>> spread_apart([0.5, 0.5, 0.5], 0.2).round(6).tolist()
    [0.3, 0.5, 0.7]
    """
    given = np.asarray(heights, np.float64)
    steps = min(gap, 1 / max(len(given) - 1, 1)) * np.arange(len(given))
    # Half way between pushing each up from its lower neighbour and down from its upper one.
    upwards = np.maximum.accumulate(given - steps)
    downwards = np.minimum.accumulate((given - steps)[::-1])[::-1]
    return np.clip((upwards + downwards) / 2 + steps, steps, 1 - steps[::-1])


def name_beside(figure: Figure, groups: Sequence[tuple[Any, Sequence[Name]]], size: float) -> None:
    """Write names in letters of `size` points in a column to the right of axes, joined to their points by thin lines.

    The limits of the axes have to be final.
    """
    figure.draw_without_rendering()  # only then is it known how high the axes are
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for ax, names in groups:
        names = sorted(names, key=lambda name: name.y)
        to_axes = ax.transData - ax.transAxes
        heights = [float(to_axes.transform((name.x, name.y))[1]) for name in names]
        gap = 1.2 * size * figure.dpi / 72 / ax.get_window_extent().height
        for name, height in zip(names, spread_apart(heights, gap), strict=True):
            look: dict[str, Any] = {"fontsize": size, "weight": "bold" if name.strong else "normal", "va": "center"}
            place = {"xytext": (1.06, height), "textcoords": "axes fraction", "annotation_clip": False}
            ax.annotate(name.text, (name.x, name.y), arrowprops=line, **place, **look)


@cache
def _has_glyph(character: str) -> bool:
    paths = [font_manager.findfont(family) for family in _list_families()]
    return character.isspace() or any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def replace_missing(figure: Figure) -> None:
    """Write characters for which no font is installed as their code points: boxes would make all names alike."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(_spell_out(text.get_text()))
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):  # their texts are made anew when they are drawn
            names = [label.get_text() for label in axis.get_ticklabels()]
            if not all(map(str.isascii, names)) and isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_ticklabels([fit_name(_spell_out(name), 44) for name in names])


def _spell_out(text: str) -> str:
    return "".join(character if _has_glyph(character) else f"<{ord(character):X}>" for character in text)


def save_png(figure: Figure, path: Path) -> None:
    """Save a figure on white paper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style(), naming(path):
        replace_missing(figure)
        figure.savefig(path, dpi=160, facecolor=PAPER, metadata={"Software": None})


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """Turn a figure into SVG for an HTML page, with a label for those who cannot see it.

    The name goes into its ids, which have to differ between the figures of a page. The same figure gives the same text
    each time.
    """
    variables = {light: f"var(--{variable})" for variable, light in COLOURS.items()}
    buffer = io.StringIO()
    with style(), mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has fonts of its own, so names stay as they are here: matplotlib only measures them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # numbered from 1 in every figure, and nobody refers to them
    drawing = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda colour: variables.get(colour[0], colour[0]), drawing)
    width, height = 72 * figure.get_size_inches()
    box = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">')
    return box.format(width, height, label) + Markup(drawing)


def save_picture(figure: Figure, target: Path, name: str, caption: str) -> Picture:
    """Turn a figure into SVG, and save it as `figures/<name>.png` below `target`."""
    svg = to_svg(figure, name, caption)  # before names are spelled out for the PNG
    save_png(figure, target / "figures" / f"{name}.png")
    return Picture(name=name, caption=caption, svg=svg)
