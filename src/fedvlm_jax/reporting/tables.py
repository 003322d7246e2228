"""Tables: shown by rich on a terminal, in Markdown, and by a template in HTML; and how numbers are written."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fedvlm_jax.evaluation.statistics.over_seeds import Difference, Estimate, judge
from fedvlm_jax.utils.console import Terminal
from fedvlm_jax.utils.standard_streams import to_ascii
from fedvlm_jax.utils.untrusted_text import clean, escape_markdown

MANY = 40  # above so many clients a table shows the two ends of the list only
# Characters across a phone. There a wider table shows each row as a list of names and figures.
PHONE = 50
# Characters of a name that is not broken beside prose.
LONGEST = 24
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
        for name, texts in self.rewrite(clean).items():
            object.__setattr__(self, name, texts)

    def rewrite(self, write: Callable[[str], str]) -> dict[str, Any]:
        """Return the fields that hold texts, each text as `write` has it."""
        rows = tuple(tuple(map(write, row)) for row in self.rows)
        columns = tuple(map(write, self.columns))
        return {"title": write(self.title), "columns": columns, "rows": rows, "note": write(self.note)}

    @property
    def is_wide(self) -> bool:
        """Wider than a phone; headings break between words, figures do not."""
        columns = zip(self.columns, *self.rows, strict=True)
        widths = [max(map(len, [*heading.split(), *cells]), default=0) for heading, *cells in columns]
        return sum(widths) + 2 * len(widths) > PHONE


def keep_ends(rows: Sequence[tuple[str, ...]], ends: str) -> tuple[Sequence[tuple[str, ...]], str]:
    """Leave out the middle of a list of many clients; return the rest, and a note that names its `ends`."""
    if len(rows) <= MANY:
        return rows, ""
    return [*rows[:10], ("…",) * len(rows[0]), *rows[-10:]], f"The {ends} ten of {len(rows)} clients."


def format_paired(difference: Difference | Estimate | None) -> str:
    """Write a paired difference in percentage points: `▲ +1.2 [+0.3, +2.1]`."""
    if difference is None:
        return "–"
    if math.isnan(difference.low):
        return f"{points(difference.mean)} [no interval]"
    return f"{MARKS[judge(difference)]} {points(difference.mean)} [{points(difference.low)}, {points(difference.high)}]"


def points(share: float) -> str:
    """Write a difference of shares in percentage points, with its sign.

    >>> points(0.012), points(-0.0001)
    ('+1.2', '0.0')
    """
    written = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if written[1:] == "0.0" else written


def format_duration(seconds: float) -> str:
    """Write a time with its two largest units.

    >>> format_duration(8.12), format_duration(192), format_duration(3840)
    ('8.1 s', '3 min 12 s', '1 h 4 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_bytes(count: float) -> str:
    """Write a number of bytes with the largest unit that keeps it above one.

    >>> format_bytes(1536), format_bytes(180_000)
    ('1.5 KiB', '176 KiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def show(console: Console, table: Table) -> None:
    """Print a table, in parts below each other where it is wider than the terminal."""
    # Before widths are measured: in ASCII a sign may take several characters.
    if not console.encoding.lower().startswith("utf"):
        table = dataclasses.replace(table, **table.rewrite(to_ascii))
    for part in cut_to_width(table, console.width):
        roomy = 1 + sum(3 + max(_measure(part, column), len(name)) for column, name in enumerate(part.columns))
        console.print(to_rich(part, tight=roomy > console.width))


def show_all(tables: Iterable[Table]) -> Terminal:
    """Print tables on the terminal that the command writes to; return it."""
    console = Terminal()
    for table in tables:
        show(console, table)
    return console


def cut_to_width(table: Table, width: int) -> list[Table]:
    """Cut a table into parts of at most `width` characters, the first column in each; prose wraps by itself."""
    if table.prose:
        return [table]
    first = 4 + _measure(table, 0)  # of every column 3 characters are frame
    groups: list[list[int]] = [[0]]
    used = first
    for column in range(1, len(table.columns)):
        needed = 3 + _measure(table, column)
        if len(groups[-1]) > 1 and used + needed > width:
            groups.append([0])
            used = first
        groups[-1].append(column)
        used += needed
    return [
        dataclasses.replace(
            table,
            title="" if number else table.title,
            columns=tuple(table.columns[column] for column in group),
            rows=tuple(tuple(row[column] for column in group) for row in table.rows),
            note=table.note if group is groups[-1] else "",
        )
        for number, group in enumerate(groups)
    ]


def _measure(table: Table, column: int) -> int:
    """Characters that a column needs: a heading breaks between words, and a figure before its interval."""
    words = table.columns[column].split() if column else [table.columns[0]]
    lines = [line for row in table.rows for line in _break_interval(row[column]).split("\n")]
    return max(map(len, (*words, *lines)), default=0)


def _break_interval(cell: str) -> str:
    return cell.replace(" [", "\n[")  # an interval goes below its mean, to fit 80 columns


def to_rich(table: Table, *, tight: bool = False) -> RichTable:
    """Show a table on a terminal; a tight one breaks its headings wherever that makes it narrower."""
    shown = RichTable(title=table.title or None, title_justify="left", title_style="bold", caption=table.note or None)
    shown.caption_justify = "left"
    for number, column in enumerate(table.columns):
        width = _measure(table, number) if tight and not table.prose else None
        if tight and table.prose and not number:  # prose wraps as it likes, names beside it stay whole
            longest = max((len(name) for name in (*column.split(), *(row[0] for row in table.rows))), default=0)
            width = longest if longest <= LONGEST else None
        side = "left" if number in (0, *table.prose) else "right"
        shown.add_column(column, justify=side, overflow="fold", width=width)
    for number, row in enumerate(table.rows):
        cells: list[Text] = []
        for column, cell in enumerate(row):
            text = cell if column in table.prose else _break_interval(cell)
            # As `Text`, brackets are not taken for rich's markup.
            cells.append(Text(text, justify="left" if column in (0, *table.prose) else "right"))
        shown.add_row(*cells, style="bold" if number in table.strong else None)
    return shown


def to_markdown(table: Table) -> str:
    """Write a table in Markdown, with its title and note."""
    rows = [list(map(escape_markdown, table.columns)), ["---", *["---:"] * (len(table.columns) - 1)]]
    for number, row in enumerate(table.rows):
        cells = list(map(escape_markdown, row))
        rows.append([f"**{cell}**" for cell in cells] if number in table.strong else cells)
    lines = [f"**{escape_markdown(table.title)}**", "", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join(lines + (["", escape_markdown(table.note)] if table.note else []))
