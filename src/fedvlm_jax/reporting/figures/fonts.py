"""Fonts of pictures: names in any script, also where the machine has no font for them."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from rich.cells import cell_len

from fedvlm_jax.utils.untrusted_text import clean

__all__ = ["fit_name", "replace_missing", "scripts"]

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
"""Families that have what matplotlib's own DejaVu Sans lacks; those that are installed are used, in this order."""


@cache
def _list_families() -> tuple[str, ...]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


@contextmanager
def scripts() -> Generator[None]:
    """Draw with fonts for as many scripts as the machine has."""
    with mpl.rc_context({"font.family": list(_list_families())}):
        yield


@cache
def _has_glyph(character: str) -> bool:
    paths = [font_manager.findfont(family) for family in _list_families()]
    return character.isspace() or any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def fit_name(name: str, width: int) -> str:
    r"""Write a name on one line of a picture, its middle left out where it is long: names differ at both ends.

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


def replace_missing(figure: Figure, width: int = 44) -> None:
    """Write characters for which no font is installed as their code points: boxes would make all names alike.

    Args:
        figure: the picture.
        width: the most that the name of a row may take then, in letters.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(_spell_out(text.get_text()))
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):  # their texts are made anew when they are drawn
            names = [label.get_text() for label in axis.get_ticklabels()]
            if not all(map(str.isascii, names)) and isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_ticklabels([fit_name(_spell_out(name), width) for name in names], parse_math=False)


def _spell_out(text: str) -> str:
    return "".join(character if _has_glyph(character) else f"<{ord(character):X}>" for character in text)
