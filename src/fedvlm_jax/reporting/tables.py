"""Tables: shown by rich on a terminal, in Markdown, and by a template in HTML; and how numbers are written."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fedvlm_jax.evaluation.statistics.over_seeds import Difference, judge
from fedvlm_jax.utils.console import knows_signs
from fedvlm_jax.utils.standard_streams import to_ascii
from fedvlm_jax.utils.untrusted_text import clean, escape_markdown

MANY = 40
"""Above so many clients a table shows the two ends of the list only."""

PHONE = 50
"""Characters across a phone. There a wider table shows each row as a list of names and figures."""

MARKS = {"ahead": "▲", "behind": "▼", "level": "≈"}


@dataclass(frozen=True)
class Table:
    """A table of finished texts.

    The first column is a name, the others are figures, but for the columns in `prose`, which a terminal shows as they
    are; `strong` rows stand out.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    note: str = ""
    prose: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Clean the texts, which others wrote: nothing in them may move a cursor or turn the line round."""
        object.__setattr__(self, "title", clean(self.title))
        object.__setattr__(self, "note", clean(self.note))
        object.__setattr__(self, "columns", tuple(map(clean, self.columns)))
        object.__setattr__(self, "rows", tuple(tuple(map(clean, row)) for row in self.rows))

    @property
    def is_wide(self) -> bool:
        """Wider than a phone; headings break between words, figures do not."""
        columns = zip(self.columns, *self.rows, strict=True)
        widths = [max(map(len, [*heading.split(), *cells]), default=0) for heading, *cells in columns]
        return sum(widths) + 2 * len(widths) > PHONE


def format_paired(difference: Difference | None) -> str:
    """Write a paired difference in percentage points: `▲ +1.2 [+0.3, +2.1]`."""
    if difference is None:
        return "–"
    if math.isnan(difference.low):
        return f"{points(difference.mean)} [no interval]"
    return f"{MARKS[judge(difference)]} {points(difference.mean)} [{points(difference.low)}, {points(difference.high)}]"


def points(share: float) -> str:
    """Write a difference of shares in percentage points, with its sign."""
    written = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if written[1:] == "0.0" else written


def format_duration(seconds: float) -> str:
    """Write a time with its two largest units: `1 h 4 min`, `3 min 12 s`, `8.1 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_bytes(count: float) -> str:
    """Write a number of bytes with the largest unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def show(console: Console, table: Table) -> None:
    """Print a table, in parts below each other where it is wider than the terminal."""
    if not knows_signs(console):
        table = _to_ascii(table)
    for part in cut_to_width(table, console.width):
        roomy = 1 + sum(3 + max(_measure(part, column), len(name)) for column, name in enumerate(part.columns))
        console.print(to_rich(part, tight=roomy > console.width))


def _to_ascii(table: Table) -> Table:
    """The same in ASCII, before widths are measured."""
    rows = tuple(tuple(map(to_ascii, row)) for row in table.rows)
    columns = tuple(map(to_ascii, table.columns))
    return dataclasses.replace(
        table, title=to_ascii(table.title), note=to_ascii(table.note), columns=columns, rows=rows
    )


def cut_to_width(table: Table, width: int) -> list[Table]:
    """Parts of a table with its first column in each, as wide as `width` characters allow; prose wraps by itself."""
    if table.prose:
        return [table]

    first = 4 + _measure(table, 0)  # of every column 3 characters are frame
    groups: list[list[int]] = [[]]
    used = first
    for column in range(1, len(table.columns)):
        if groups[-1] and used + 3 + _measure(table, column) > width:
            groups.append([])
            used = first
        groups[-1].append(column)
        used += 3 + _measure(table, column)
    parts = []
    for number, group in enumerate(groups):
        columns = (0, *group)
        parts.append(
            dataclasses.replace(
                table,
                title="" if number else table.title,
                columns=tuple(table.columns[column] for column in columns),
                rows=tuple(tuple(row[column] for column in columns) for row in table.rows),
                note=table.note if number == len(groups) - 1 else "",
            )
        )
    return parts


def _measure(table: Table, column: int) -> int:
    """Characters that a column needs: a heading breaks between words, and a figure before its interval."""
    words = table.columns[column].split() if column else [table.columns[0]]
    lines = [line for row in table.rows for line in _break_interval(row[column]).split("\n")]
    return max(map(len, (*words, *lines)), default=0)


def to_rich(table: Table, *, tight: bool = False) -> RichTable:
    """Show a table on a terminal; a tight one breaks its headings wherever that makes it narrower."""
    shown = RichTable(title=table.title or None, title_justify="left", title_style="bold", caption=table.note or None)
    shown.caption_justify = "left"
    for number, column in enumerate(table.columns):
        side = "left" if number in (0, *table.prose) else "right"
        width = _measure(table, number) if tight and not table.prose else None
        shown.add_column(column, justify=side, overflow="fold", width=width)
    for number, row in enumerate(table.rows):
        # Brackets are text here, not rich's markup.
        cells = [
            Text(cell, justify="left")
            if column in table.prose
            else Text(_break_interval(cell), justify="right" if column else "left")
            for column, cell in enumerate(row)
        ]
        shown.add_row(*cells, style="bold" if number in table.strong else None)
    return shown


def _break_interval(cell: str) -> str:
    """An interval goes below its mean, to fit 80 columns."""
    return cell.replace(" [", "\n[")


def to_markdown(table: Table) -> str:
    """Write a table in Markdown, with its title and note."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    columns = [escape_markdown(column) for column in table.columns]
    lines = [f"**{escape_markdown(table.title)}**", "", _join_row(columns), _join_row(rule)]
    for number, row in enumerate(table.rows):
        cells = map(escape_markdown, row)
        lines.append(_join_row([f"**{cell}**" if number in table.strong else cell for cell in cells]))
    return "\n".join(lines + (["", escape_markdown(table.note)] if table.note else []))


def _join_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
