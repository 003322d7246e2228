"""Tables of runs and comparisons: one record, shown by rich on a terminal, in Markdown, and in HTML."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fedvlm_jax.evaluation.metrics.metric_labels import MEASURES, Measure, find_measure, order_measures, percent
from fedvlm_jax.evaluation.statistics.confidence_intervals import Difference
from fedvlm_jax.evaluation.statistics.cross_client_matrix import summarise_matrix
from fedvlm_jax.evaluation.statistics.over_clients import summarise, summarise_gain
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, judge, order_by_mean, spread
from fedvlm_jax.training.run_dir.reader import ComparisonRecord, RunRecord, read_baseline
from fedvlm_jax.utils.console import knows_signs
from fedvlm_jax.utils.standard_streams import to_ascii
from fedvlm_jax.utils.untrusted_text import clean, escape_markdown

__all__ = [
    "MARKS",
    "RIVALS",
    "Table",
    "cut_to_width",
    "format_bytes",
    "format_duration",
    "format_paired",
    "show",
    "tabulate_comparison",
    "tabulate_run",
    "tabulate_runs",
    "to_html",
    "to_markdown",
    "to_rich",
]

MANY = 40
"""Above so many clients a table shows the two ends of the list only."""

PHONE = 50
"""Characters across a phone. There a wider table shows each row as a list of names and figures."""

MANY_METHODS = 8
"""Above so many methods they are listed best first, and go down a table that else has them across."""

MARKS = {"ahead": "▲", "behind": "▼", "level": "≈"}

ALONE = "alone"
"""The key of a run's own baseline among its models."""

RIVALS = ("local", "fedavg-lora+ft")
"""What every method is compared with, client by client: they are the two that are hard to beat."""


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
        """Names and texts are others': nothing in them may move a cursor or turn the line round."""
        object.__setattr__(self, "title", clean(self.title))
        object.__setattr__(self, "note", clean(self.note))
        object.__setattr__(self, "columns", tuple(map(clean, self.columns)))
        object.__setattr__(self, "rows", tuple(tuple(map(clean, row)) for row in self.rows))


def tabulate_run(record: RunRecord) -> list[Table]:
    """Tabulate a run: zero-shot against the personal models, by the metric that judges and by all others; clients."""
    clients = _tabulate_clients(find_measure(record.metric), record.scores("zero_shot"), record.scores("personal"))
    matrix = _tabulate_matrix(record)
    tables = [_tabulate_models(record), _tabulate_metrics(record), clients, matrix]
    return [table for table in tables if table.rows]


def tabulate_runs(records: list[RunRecord]) -> Table:
    """Tabulate several runs, one row each."""
    rows = []
    for record in records:
        zero_shot, personal = summarise(record.scores("zero_shot")), summarise(record.scores("personal"))
        figures = (zero_shot.mean, personal.mean, personal.std, personal.worst_decile)
        seed = str(record.options.get("seed", "?"))
        rows.append((record.folder.name, record.method, seed, *map(percent, figures)))
    columns = ("run", "method", "seed", "zero-shot mean", "personal mean", "std over clients", "worst decile")
    labels = dict.fromkeys(find_measure(record.metric).label for record in records)
    return Table(f"{_capitalise(', '.join(labels))} on test", columns, tuple(rows))


def tabulate_comparison(record: ComparisonRecord) -> list[Table]:
    """Tabulate a comparison: one row per method, zero-shot first; then the mean of every client."""
    methods = ["zero-shot", *record.methods]
    scores = {method: record.scores(method) for method in methods}
    methods = [method for method in methods if scores[method]]
    if len(methods) > MANY_METHODS:
        methods = order_by_mean(scores, methods)
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
        f"{_capitalise(find_measure(record.metric).label)} on test, mean over clients ± standard deviation over "
        f"{seeds}; worst decile: mean of the worst tenth of the clients. Bold: the highest mean."
    )
    if rivals:
        note += (
            " Against another method: difference in percentage points on the same clients, with its 95 % t-interval "
            f"over {'seeds' if len(record.seeds) > 1 else 'clients (one seed only)'}; "
            f"{', '.join(f'{mark} {meaning}' for meaning, mark in MARKS.items())} (the interval holds zero)."
        )
    columns = ("method", "mean", "worst decile", *(f"against {rival}" for rival in rivals), "upload per client, round")
    best = frozenset(index for index, mean in enumerate(means) if mean == max(means))
    others = _tabulate_all_metrics(record, methods)
    return [Table("Methods", columns, tuple(rows), best, note), *([others] if others.rows else [])]


def _name_models(record: RunRecord) -> list[tuple[str, str]]:
    """Label and key of the models that were scored; held-out clients come last."""
    cold = (record.results.get("held_out") or {}).get("cold_start", "")
    named = [
        ("zero-shot", "zero_shot"),
        ("global model", "global"),
        (f"personal ({record.method})", "personal"),
        ("held-out clients, zero-shot", "held_out/zero_shot"),
        (f"held-out clients, cold start ({cold})", "held_out/personal"),
    ]
    return [(label, model) for label, model in named if record.scores(model)]


def _tabulate_models(record: RunRecord) -> Table:
    """The metric that judges: its spread over clients, and the gain over zero-shot."""
    alone = read_baseline(record)
    rows, models = [], _name_models(record)
    models[1:1] = [("training alone (local)", ALONE)] if alone and alone.scores("personal", record.metric) else []
    for label, model in models:
        own = alone.scores("personal", record.metric) if alone and model == ALONE else record.scores(model)
        summary = summarise(own)
        base = record.scores("held_out/zero_shot" if model.startswith("held_out") else "zero_shot")
        gain = "–" if model.endswith("zero_shot") else _format_gain(own, base)
        figures = (summary.mean, summary.std, summary.min, summary.worst_decile)
        rows.append((label, *map(percent, figures), _write_jain(summary.jain), gain))
    columns = ("model", "mean", "std", "min", "worst decile", "Jain", "gain over zero-shot")
    strong = frozenset(number for number, (_, model) in enumerate(models) if model == "personal")
    title = f"{_capitalise(find_measure(record.metric).label)} on test, {len(record.scores('personal'))} clients"
    note = (
        "Spread over clients; Jain: fairness index, 1 where all are alike, none where all are zero; gain in points "
        "with its 95 % interval."
    )
    return Table(title, columns, tuple(rows), strong, note)


def _write_jain(index: float) -> str:
    return "–" if math.isnan(index) else f"{index:.3f}"


def _format_gain(own: Mapping[str, float], base: Mapping[str, float]) -> str:
    common = {client: own[client] for client in own if client in base}
    if not common:
        return "–"
    gain = summarise_gain(common, {client: base[client] for client in common})
    return f"{points(gain.mean)} [{points(gain.low)}, {points(gain.high)}]"


def _tabulate_metrics(record: RunRecord) -> Table:
    """All the other metrics, means over clients."""
    models = _name_models(record)
    measures = [measure for measure in order_measures(record.metrics()) if measure.name != record.metric]
    rows = []
    for measure in measures:
        scores = [record.scores(model, measure.name) for _, model in models]
        rows.append((measure.label, *(measure.write(summarise(own).mean) if own else "–" for own in scores)))
    columns = ("metric", *(label for label, _ in models))
    return Table("Other metrics on test, mean over clients", columns, tuple(rows))


def _tabulate_all_metrics(record: ComparisonRecord, methods: list[str]) -> Table:
    """Every metric of every method, mean over clients, then over seeds."""
    names = {name for run in record.runs for name, values in (run.get("test") or {}).items() if values}
    measures = [measure for measure in order_measures(names) if measure.name != record.metric]
    rows = []
    for measure in measures:
        written = []
        for method in methods:
            by_seed = record.scores(method, measure.name)
            mean = spread([summarise(one).mean for one in by_seed.values()]).mean if by_seed else math.nan
            written.append(measure.write(mean))
        rows.append((measure.label, *written))
    title, columns = "Other metrics on test, mean over clients and seeds", ("metric", *methods)
    if len(methods) > MANY_METHODS and rows:
        turned = list(zip(columns, *rows, strict=True))
        return Table(title, ("method", *turned[0][1:]), tuple(turned[1:]))
    return Table(title, columns, tuple(rows))


def _tabulate_matrix(record: RunRecord) -> Table:
    """What the cross-client matrix says, metric by metric; empty where it was not asked for."""
    stored = record.results.get("cross_clients") or {}
    rows = []
    for name, values in stored.items():
        if name in MEASURES:
            measure = MEASURES[name]
            matrix = summarise_matrix(np.asarray(values), stored["clients"], measure.higher)
            row = (measure.write(matrix.own), measure.write(matrix.others), percent(matrix.own_best))
            rows.append((measure.label, *row, str(len(matrix.rivals))))
    columns = ("metric", "own model", "others' models", "own is best", "better off with another's")
    return Table("Every client's model on every client's test data", columns, tuple(rows))


def _tabulate_clients(measure: Measure, zero_shot: Mapping[str, float], personal: Mapping[str, float]) -> Table:
    change = f"{_capitalise(measure.label)} per client, zero-shot → personal"
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


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


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


def _is_wide(table: Table) -> bool:
    """Tell whether a table is wider than a phone; headings break between words, figures do not."""
    columns = zip(table.columns, *table.rows, strict=True)
    widths = [max(map(len, [*heading.split(), *cells]), default=0) for heading, *cells in columns]
    return sum(widths) + 2 * len(widths) > PHONE


def to_html(table: Table) -> str:
    """Write a table as HTML: it may scroll sideways in its own box, and one of many columns folds on a phone."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        cells = f'<th scope="row">{html.escape(row[0])}</th>'
        cells += "".join(
            f'<td data-label="{html.escape(column)}">{html.escape(cell).replace(" %", "&nbsp;%")}</td>'
            for column, cell in zip(table.columns[1:], row[1:], strict=True)
        )
        body.append(f"<tr{' class=strong' if number in table.strong else ''}>{cells}</tr>")
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<div class=scroll tabindex=0><table{' class=fold' if _is_wide(table) else ''}>"
        f"<caption>{html.escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )
