"""The HTML page of a report: one file with its style and pictures inside, for a phone and a desk, light and dark."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvlm_jax.reporting.example_cards import Card, to_html_cards, to_markdown_cards
from fedvlm_jax.reporting.figures.theme import CSS_DARK, CSS_LIGHT
from fedvlm_jax.reporting.tables import Table, to_html, to_markdown
from fedvlm_jax.utils.untrusted_text import clean, escape_markdown

__all__ = ["Facts", "Picture", "Report", "Section", "to_markdown_page", "to_page"]


@dataclass(frozen=True)
class Picture:
    """A picture in the forms that the two pages need."""

    name: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Facts:
    """Names and values that are folded away on the page; `marked` ones differ from the default."""

    title: str
    values: Mapping[str, str]
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Report:
    """A title, the figures one looks for first (a number and what it is), and sections."""

    title: str
    subtitle: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section]


STYLE = """
:root{color-scheme:light dark;LIGHT;--card:#f6f7f9}
@media(prefers-color-scheme:dark){:root{DARK;--card:#1c2024}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.6rem 0 .7rem;padding-top:.9rem;border-top:1px solid var(--grid)}
p{margin:.4rem 0;max-width:46rem}
.sub,.note,figcaption,caption{color:var(--muted);font-size:.88rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem;margin:1.5rem 0 .5rem}
.figures div{background:var(--card);border-radius:.6rem;padding:.8rem 1rem}
.figures b{display:block;font-size:1.5rem;line-height:1.25;font-variant-numeric:tabular-nums;white-space:nowrap}
.figures span{color:var(--muted);font-size:.85rem;line-height:1.3;display:block}
ul{padding-left:1.15rem;margin:.4rem 0;max-width:46rem}li{margin:.3rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:1rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.4rem}
th,td{padding:.42rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{color:var(--muted);font-weight:500;white-space:normal;vertical-align:bottom;line-height:1.25}
th:first-child,td:first-child{text-align:left;padding-left:0}tbody th{font-weight:500}
tr.strong>*{font-weight:700}
figure{margin:1.4rem 0}figure svg{display:block;height:auto}.narrow{display:none}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.9rem;margin:1.2rem 0 .5rem}
.cards article{background:var(--card);border-radius:.6rem;padding:.9rem 1rem;overflow:hidden}
.cards img{float:right;width:5.5rem;height:5.5rem;object-fit:contain;background:#fff;border-radius:.4rem;
margin:0 0 .5rem .8rem}
.cards p{margin:0 0 .3rem}.cards dl{clear:both;grid-template-columns:max-content 1fr;margin:.6rem 0 0;gap:.25rem .8rem}
.cards dd{margin:0}.cards span{white-space:nowrap;color:var(--muted)}.cards span i{font-style:normal;font-weight:700}
.right{color:var(--s2)}.wrong{color:var(--s3)}.partly{color:var(--muted)}
pre{background:var(--card);border-radius:.6rem;padding:.8rem 1rem;overflow-x:auto;font-size:.86rem;margin:.8rem 0}
code{font-size:.9em}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--muted)}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.15rem 1.2rem;font-size:.86rem;margin:.6rem 0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
dd.marked{font-weight:700}
@media(max-width:40rem){main{padding:1.5rem 1rem 3rem}.wide{display:none}.narrow{display:block}
h1{font-size:1.4rem}.figures{grid-template-columns:1fr 1fr}.figures b{font-size:1.25rem}
th,td{padding:.4rem .38rem}table{font-size:.86rem}
tbody th:first-child{position:sticky;left:0;background:var(--paper)}
.fold thead{display:none}.fold tr{display:grid;grid-template-columns:1fr 1fr;column-gap:1.4rem;padding:.45rem 0;
border-bottom:1px solid var(--grid)}.fold tbody :is(th,td){border:0;padding:.1rem 0;white-space:normal}
.fold tbody th{grid-column:1/-1;position:static}.fold td{display:flex;justify-content:space-between;gap:.6rem}
.fold td::before{content:attr(data-label);color:var(--muted);font-weight:400;text-align:left}
details dl{grid-template-columns:1fr}details dd{margin-bottom:.4rem}}
"""


def to_page(report: Report) -> str:
    """Write the page. It asks nothing of the network."""
    style = " ".join(STYLE.replace("LIGHT;", CSS_LIGHT).replace("DARK;", CSS_DARK).split("\n"))
    figures = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in report.figures
    )
    sections = "".join(_write_section(section) for section in report.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(report.title)}</title><style>{style}</style></head><body><main>"
        f'<h1>{html.escape(report.title)}</h1><p class="sub">{html.escape(report.subtitle)}</p>'
        f'<div class="figures">{figures}</div>{sections}</main></body></html>\n'
    )


def _write_section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.sentences:
        parts.append("<ul>" + "".join(f"<li>{_mark_code(sentence)}</li>" for sentence in section.sentences) + "</ul>")
    parts += [to_html(table) for table in section.tables]
    parts += [
        f'<figure><div class="wide">{picture.wide}</div><div class="narrow">{picture.narrow}</div>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in section.pictures
    ]
    parts.append(to_html_cards(section.cards, section.cards_note))
    if section.command:
        parts.append(f"<pre>{html.escape(section.command)}</pre>")
    parts += [_write_facts(facts) for facts in section.facts]
    return "".join(parts) + "</section>"


def _mark_code(sentence: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(sentence))


def _write_facts(facts: Facts) -> str:
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd{' class=marked' if name in facts.marked else ''}>{html.escape(value)}</dd>"
        for name, value in facts.values.items()
    )
    return f"<details><summary>{html.escape(facts.title)}</summary><dl>{rows}</dl></details>"


def to_markdown_page(report: Report, folder: Path) -> str:
    """Write the same report in Markdown, to stand in `folder`; pictures are PNG files below it."""
    blocks = [f"# {escape_markdown(report.title)}", escape_markdown(report.subtitle)]
    blocks.append("\n".join(f"- **{value}** {escape_markdown(what)}" for value, what in report.figures))
    for section in report.sections:
        blocks.append(f"## {escape_markdown(section.title)}")
        if section.sentences:
            blocks.append("\n".join(f"- {_escape_sentence(sentence)}" for sentence in section.sentences))
        blocks += [to_markdown(table) for table in section.tables]
        blocks += [f"![{escape_markdown(picture.caption)}](figures/{picture.name}.png)" for picture in section.pictures]
        if section.cards:
            blocks.append(to_markdown_cards(section.cards, section.cards_note, folder))
        if section.command:
            blocks.append(f"```\n{clean(section.command)}\n```")
        for facts in section.facts:
            rows = [f"{clean(name)} = {clean(value)}" for name, value in facts.values.items()]
            blocks.append(f"{facts.title}:\n\n```\n" + "\n".join(rows) + "\n```")
    return "\n\n".join(blocks) + "\n"


def _escape_sentence(sentence: str) -> str:
    """Escape a sentence but for the commands in it, which stand between backticks."""
    parts = re.split(r"(`fedvlm [^`]*`)", sentence)
    return "".join(clean(part) if number % 2 else escape_markdown(part) for number, part in enumerate(parts))
