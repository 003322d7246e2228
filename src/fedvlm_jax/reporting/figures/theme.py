"""The look of figures: colours, fonts, names of any length and script, and how a figure becomes a PNG file and SVG.

A figure is drawn once. In its SVG the colours of the palette become CSS variables of the page, so that it follows the
page's light or dark scheme. The colours of series are Okabe and Ito's, chosen for all kinds of colour vision; series
differ in their markers too.
"""

import io
import itertools
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator
from rich.cells import cell_len

from fedvlm_jax.errors import naming
from fedvlm_jax.utils.untrusted_text import clean

PALETTE = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#636b74", "#9aa3ad"),
    "grid": ("#e3e6ea", "#30363d"),
    "paper": ("#ffffff", "#14171a"),
    "s0": ("#0072b2", "#4fa9e6"),
    "s1": ("#d99100", "#f0b13c"),
    "s2": ("#009e73", "#2cc796"),
    "s3": ("#d55e00", "#ff8143"),
    "s4": ("#b3569a", "#e08cc8"),
    "s5": ("#3f9fd6", "#8ccbf2"),
    "s6": ("#7a6a00", "#cbb84a"),
    "s7": ("#5b6570", "#a9b3bd"),
}
"""CSS variable -> its light and its dark colour."""

INK, MUTED, GRID, PAPER, *_SERIES = (light for light, _ in PALETTE.values())
SERIES = tuple(_SERIES)
VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}

MARKERS = "osD^vPX*"
BEFORE = (0, (4, 2))
"""Dashes of validation before redistribution, in every figure; what came after is solid."""

LEVEL, DOTTED = (0, (4, 3)), (0, (1, 2))
"""Dashes of means and other levels, and dots of what is only a reference."""

MANY = len(MARKERS)
"""Above so many methods colours and markers repeat, so that names have to stand beside what is drawn."""

LABELLED = 48
"""Above so many clients their names are left out of figures."""

WIDE = 7.6
"""Width of a page's figures in inches."""

FIRST_SERIES = ("local", "fedavg-lora", "fedavg-lora+ft", "plora")
"""Methods that keep their colour from one report to the next."""

STYLE: dict[Any, Any] = {
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a client's name starts no formula
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: it can be searched, and the browser's fonts have all scripts
    **{
        f"{axis}tick.{key}": value
        for axis in "xy"
        for key, value in {"color": MUTED, "labelcolor": INK, "labelsize": 9, "major.size": 0, "minor.size": 0}.items()
    },
}

FALLBACKS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans JP",
    "Noto Sans SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)
"""Families that have what matplotlib's DejaVu Sans lacks; those that are installed are used, in this order."""


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
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


@contextmanager
def style() -> Generator[None]:
    """Draw and save in this look, with fonts for as many scripts as the machine has."""
    with mpl.rc_context({**STYLE, "font.family": list(_list_families())}):
        yield


def choose_series(methods: Sequence[str]) -> dict[str, int]:
    """Give each method the number of its colour and marker; the common methods always have the same."""
    taken = {FIRST_SERIES.index(method) for method in methods if method in FIRST_SERIES}
    free = itertools.cycle([number for number in range(8) if number not in taken] or [7])
    return {method: FIRST_SERIES.index(method) if method in FIRST_SERIES else next(free) for method in methods}


def make_figure(width: float, height: float, columns: int = 1, rows: int = 1, **layout: Any) -> Any:
    """Make a figure without pyplot's global state, and its axes.

    Args:
        width, height: in inches.
        columns, rows: numbers of axes.
        layout: further arguments of `Figure.subplots`.

    Returns:
        The figure and a list of axes, row by row.
    """
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
    """Put ticks of the horizontal axis at whole numbers alone, at most so many; of one round that is one tick."""
    ax.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def fit_name(name: str, width: int) -> str:
    r"""Write a name on one line of a figure, its middle left out where it is long: names differ at both ends.

    Args:
        name: by whomever; characters that are not seen are written as escapes.
        width: the most that it may take, in columns of a Latin letter (a Chinese one takes two).

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


def annotate(
    ax: Any, at: tuple[float, float], text: str, frame: Any, shift: tuple[int, int], align: str, **look: Any
) -> None:
    """Write a text beside a place; `frame` says in which coordinates, `shift` is in points."""
    look = {"fontsize": 9, **look}
    ax.annotate(text, at, xycoords=frame, xytext=shift, textcoords="offset points", ha=align, **look)


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
    """Write names in a column to the right of axes, each joined to its point by a thin line.

    Args:
        figure: the figure, whose limits have to be final.
        groups: axes and their names.
        size: of the letters, in points.
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
            ax.annotate(
                name.text, (name.x, name.y), xytext=(1.06, height), textcoords="axes fraction",
                annotation_clip=False, arrowprops=line, **look,
            )  # fmt: skip


@cache
def _has_glyph(character: str) -> bool:
    paths = [font_manager.findfont(family) for family in _list_families()]
    return character.isspace() or any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def replace_missing(figure: Figure, width: int = 44) -> None:
    """Write characters for which no font is installed as their code points: boxes would make all names alike.

    Args:
        figure: the figure.
        width: the most that the name of a row may take then, in letters.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(_spell_out(text.get_text()))
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):  # their texts are made anew when they are drawn
            names = [label.get_text() for label in axis.get_ticklabels()]
            if not all(map(str.isascii, names)) and isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_ticklabels([fit_name(_spell_out(name), width) for name in names])


def _spell_out(text: str) -> str:
    return "".join(character if _has_glyph(character) else f"<{ord(character):X}>" for character in text)


def save_png(figure: Figure, path: Path) -> None:
    """Save a figure on white paper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style(), naming(path):
        replace_missing(figure)
        figure.savefig(path, dpi=160, facecolor=PAPER, metadata={"Software": None})


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """Turn a figure into SVG to be put into an HTML page; the same figure gives the same text each time.

    Args:
        figure: the figure.
        name: goes into its ids, which have to differ between the figures of a page.
        label: describes it to those who cannot see it.
    """
    buffer = io.StringIO()
    with style(), mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has fonts of its own, so names stay as they are here: matplotlib only measures them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # numbered from 1 in every figure, and nobody refers to them
    drawing = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda colour: VARIABLES.get(colour[0], colour[0]), drawing)
    width, height = 72 * figure.get_size_inches()
    box = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">')
    return box.format(width, height, label) + Markup(drawing)


def save_picture(figure: Figure, target: Path, name: str, caption: str) -> Picture:
    """Turn a figure into SVG, and save it as `figures/<name>.png` below `target`."""
    svg = to_svg(figure, name, caption)
    save_png(figure, target / "figures" / f"{name}.png")
    return Picture(name=name, caption=caption, svg=svg)
