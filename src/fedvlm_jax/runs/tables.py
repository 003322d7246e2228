"""Tables of runs and comparisons: one record, shown by rich on a terminal, in Markdown, and in HTML."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text

from fedvlm_jax.evaluation.intervals import Difference
from fedvlm_jax.evaluation.spread import summarise
from fedvlm_jax.runs.folders import ComparisonRecord, RunRecord
from fedvlm_jax.runs.statistics import compare_paired, judge, spread

__all__ = [
    "MARKS",
    "RIVALS",
    "Table",
    "format_bytes",
    "format_paired",
    "tabulate_comparison",
    "tabulate_run",
    "tabulate_runs",
    "to_html",
    "to_markdown",
    "to_rich",
]

MANY = 40
"""Above so many clients a table shows the two ends of the list only."""

MARKS = {"ahead": "▲", "behind": "▼", "level": "≈"}

RIVALS = ("local", "fedavg-lora+ft")
"""What every method is compared with, client by client: they are the two that are hard to beat."""


@dataclass(frozen=True)
class Table:
    """A table of finished texts. The first column is a name, the others are figures; `strong` rows stand out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    note: str = ""


def tabulate_run(record: RunRecord) -> list[Table]:
    """Tabulate a run: zero-shot against the personal models, then client by client."""
    clients = _tabulate_clients(record.scores("zero_shot"), record.scores("personal"))
    return [_tabulate_models(record), *([clients] if clients.rows else [])]


def tabulate_runs(records: list[RunRecord]) -> Table:
    """Tabulate several runs, one row each."""
    rows = []
    for record in records:
        zero_shot, personal = summarise(record.scores("zero_shot")), summarise(record.scores("personal"))
        figures = (zero_shot.mean, personal.mean, personal.std, personal.worst_decile)
        seed = str(record.options.get("seed", "?"))
        rows.append((record.folder.name, record.method, seed, *map(percent, figures)))
    columns = ("run", "method", "seed", "zero-shot mean", "personal mean", "std over clients", "worst decile")
    return Table("Exact match on test", columns, tuple(rows))


def tabulate_comparison(record: ComparisonRecord) -> list[Table]:
    """Tabulate a comparison: one row per method, zero-shot first; then the mean of every client."""
    methods = ["zero-shot", *record.methods]
    scores = {method: record.scores(method) for method in methods}
    methods = [method for method in methods if scores[method]]
    rivals = [rival for rival in RIVALS if scores.get(rival)]
    rows, means = [], []
    for method in methods:
        summaries = [summarise(one) for one in scores[method].values()]
        accuracy = spread([one.mean for one in summaries])
        worst = spread([one.worst_decile for one in summaries])
        means.append(accuracy.mean)
        against = [
            "–" if method == rival else format_paired(compare_paired(scores[method], scores[rival])) for rival in rivals
        ]
        sent = [run["bytes_up_per_client"] for run in record.runs if run["method"] == method]
        upload = format_bytes(sum(sent) / len(sent)) if sent else "–"
        around = "" if accuracy.std is None else f" ± {100 * accuracy.std:.1f}"
        rows.append((method, f"{100 * accuracy.mean:.1f}{around} %", percent(worst.mean), *against, upload))
    seeds = f"{len(record.seeds)} seed{'s' if len(record.seeds) != 1 else ''}"
    note = (
        f"Exact match on test, mean over clients ± standard deviation over {seeds}; worst decile: mean of the worst "
        "tenth of the clients. Against another method: difference in percentage points on the same clients, "
        f"with its 95 % t-interval over {'seeds' if len(record.seeds) > 1 else 'clients (one seed only)'}; "
        "▲ ahead, ▼ behind, ≈ the interval holds zero. Bold: the highest mean."
    )
    columns = ("method", "mean", "worst decile", *(f"against {rival}" for rival in rivals), "upload per client, round")
    best = frozenset(index for index, mean in enumerate(means) if mean == max(means))
    return [Table("Methods", columns, tuple(rows), best, note)]


def _tabulate_models(record: RunRecord) -> Table:
    rows = []
    for name, model in (("zero-shot", "zero_shot"), (f"personal ({record.method})", "personal")):
        accuracy = summarise(record.scores(model))
        tokens, loss = record.scores(model, "token_accuracy"), record.scores(model, "loss")
        rows.append(
            (
                name,
                *map(percent, (accuracy.mean, accuracy.std, accuracy.worst_decile)),
                percent(summarise(tokens).mean) if tokens else "–",
                f"{summarise(loss).mean:.3f}" if loss else "–",
            )
        )
    columns = ("model", "exact match", "std over clients", "worst decile", "token accuracy", "loss")
    return Table(f"Test, {len(record.scores('personal'))} clients", columns, tuple(rows), frozenset({1}))


def _tabulate_clients(zero_shot: Mapping[str, float], personal: Mapping[str, float]) -> Table:
    """Lay clients out as a grid where their names are `row-column`, else as a list; long lists lose their middle."""
    change = "Exact match per client, zero-shot → personal"
    cells = {client: f"{_short(zero_shot.get(client))} → {_short(personal[client])}" for client in personal}
    split = {client: client.rsplit("-", 1) for client in personal if "-" in client}
    rows = list(dict.fromkeys(parts[0] for parts in split.values()))
    columns = list(dict.fromkeys(parts[1] for parts in split.values()))
    if len(split) == len(personal) and 1 < len(columns) <= 8 and len(rows) <= MANY and len(rows) > 1:
        grid = tuple((row, *(cells.get(f"{row}-{column}", "") for column in columns)) for row in rows)
        return Table(f"{change} (%)", ("", *columns), grid)
    order = sorted(personal, key=lambda client: personal[client], reverse=True)
    listed = [(client, percent(zero_shot.get(client, math.nan)), percent(personal[client])) for client in order]
    note = ""
    if len(listed) > MANY:
        note = f"The best and the worst ten of {len(listed)} clients."
        listed = [*listed[:10], ("…", "…", "…"), *listed[-10:]]
    return Table(change, ("client", "zero-shot", "personal"), tuple(listed), note=note)


def percent(share: float) -> str:
    """Write a share as a percentage with one decimal."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _short(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


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


def format_bytes(count: float) -> str:
    """Write a number of bytes with the largest unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def to_rich(table: Table) -> RichTable:
    """Show a table on a terminal."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", caption=table.note or None)
    shown.caption_justify = "left"
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for number, row in enumerate(table.rows):
        # An interval goes below its mean, to fit 80 columns. Its brackets are text, not rich's markup.
        cells = [
            Text(cell.replace(" [", "\n["), justify="right" if column else "left") for column, cell in enumerate(row)
        ]
        shown.add_row(*cells, style="bold" if number in table.strong else None)
    return shown


def to_markdown(table: Table) -> str:
    """Write a table in Markdown, with its title and note."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [f"**{table.title}**", "", _join_row(table.columns), _join_row(rule)]
    for number, row in enumerate(table.rows):
        bold = number in table.strong
        lines.append(_join_row([f"**{cell}**" if bold else cell for cell in row]))
    return "\n".join(lines + (["", table.note] if table.note else []))


def _join_row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def to_html(table: Table) -> str:
    """Write a table as HTML that may scroll sideways inside its own box."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        cells = f'<th scope="row">{html.escape(row[0])}</th>'
        cells += "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        body.append(f"<tr{' class=strong' if number in table.strong else ''}>{cells}</tr>")
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<div class=scroll tabindex=0><table><caption>{html.escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )
