"""A report's page, as HTML and as Markdown, made by the templates beside this file.

What strangers wrote (client names, questions, answers, paths) is escaped by default in both: HTML by jinja2's
autoescape, Markdown by `escape_markdown`. Only what is `Markup` passes as it is.
"""

import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fedvlm_jax.reporting.example_cards import Card
from fedvlm_jax.reporting.figures.theme import PALETTE, Picture
from fedvlm_jax.reporting.tables import Table, to_markdown
from fedvlm_jax.utils.untrusted_text import clean, escape_markdown

LONG = 240  # texts of examples are cut to so many characters; the run's folder has them whole


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values that are folded away on the page; `marked` ones differ from the default."""

    title: str
    values: Mapping[str, str]
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what belongs under it."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    cards: Sequence[Card] = ()
    cards_note: str = ""
    command: str = ""
    facts: Sequence[Facts] = ()

    @property
    def has_content(self) -> bool:
        """Whether there is more than a heading, which alone is left out of the page."""
        return any((self.sentences, self.tables, self.pictures, self.cards, self.command, self.facts))


@dataclass(frozen=True, kw_only=True)
class Report:
    """A title, the figures that a reader looks for first (a number and its meaning), and sections."""

    title: str
    subtitle: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render(template: str, **values: Any) -> str:
    """Fill `report.html.j2`, `report.md.j2` or a part of one; a name without a value is an error."""
    return _make_environment(template.endswith(".html.j2")).get_template(template).render(values)


@cache
def _make_environment(to_html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("fedvlm_jax.reporting"),
        autoescape=to_html,
        finalize=None if to_html else lambda value: value if isinstance(value, Markup) else escape_markdown(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = environment.filters
    filters.update(
        base64=lambda content: b64encode(content).decode("ascii"),
        clean=lambda text: Markup(clean(text)),
        code=mark_code if to_html else keep_commands,
        cut=_cut,
        markdown=lambda table: Markup(to_markdown(table)),
        relative_to=lambda path, folder: Path(os.path.relpath(path, folder)).as_posix(),
    )
    names: dict[str, Any] = environment.globals
    names["palette"] = PALETTE
    return environment


def mark_code(sentence: str) -> Markup:
    """Escape a sentence for HTML, and mark what stands between backticks as code.

    >>> print(mark_code("1 < 2, says `fedvlm report`"))
    1 &lt; 2, says <code>fedvlm report</code>
    """
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(sentence))))


def keep_commands(sentence: str) -> Markup:
    r"""Escape a sentence for Markdown but for the commands in it, which stand between backticks.

    >>> print(keep_commands("`odd` names; `fedvlm data --out a_b` lists them"))
    \`odd\` names; `fedvlm data --out a_b` lists them
    """
    parts = re.split(r"(`fedvlm [^`]*`)", sentence)
    return Markup("".join(clean(part) if number % 2 else escape_markdown(part) for number, part in enumerate(parts)))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONG else text[: LONG - 1].rstrip() + "…"
