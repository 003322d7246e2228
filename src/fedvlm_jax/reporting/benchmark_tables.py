"""Tables of benchmarks: a line, all lines of a file, and a line held against its rerun."""

import math
from collections.abc import Sequence
from pathlib import Path

from fedvlm_jax.config.benchmark import Benchmark, find_benchmark, list_benchmarks
from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import Estimate, estimate_mean, spread, subtract_scores
from fedvlm_jax.reporting.tables import MARKS, Table, format_bytes, format_duration, format_paired, points, to_markdown
from fedvlm_jax.run_dir.benchmark_entry import LONG, ZERO_SHOT, Entry, read_entries
from fedvlm_jax.training.benchmarks.check import Verdict
from fedvlm_jax.utils.untrusted_text import cut

RIVAL = "local"


def tabulate_entry(entry: Entry) -> Table:
    """Tabulate a line, the best row first: means with their intervals, and what is ahead of training alone.

    >>> from fedvlm_jax.run_dir.benchmark_entry import Row
    >>> rows = tuple(
    ...     Row(name, None, {}, {"0": {"ann": score, "bob": score}}, None, 0.0)
    ...     for name, score in (("zero-shot", 0.25), ("plora", 0.5))
    ... )
    >>> entry = Entry("emoji-16", 1, "ab", "exact_match", (0,), rows, "d", "w", "0.1", "0.10", {}, None, 0.0)
    >>> [row[:3] for row in tabulate_entry(entry).rows]
    [('plora', '50.0 [50.0, 50.0]', '▲ +25.0 [+25.0, +25.0]'), ('zero-shot', '25.0 [25.0, 25.0]', '–')]
    """
    estimates = {row.method: estimate_mean(row.by_seed) for row in entry.rows}
    rival = RIVAL if RIVAL in estimates else ZERO_SHOT
    rows = list[tuple[str, ...]]()
    for row in sorted(entry.rows, key=lambda row: -estimates[row.method].mean):
        worst = spread([summarise(scores).worst_decile for scores in row.by_seed.values()]).mean
        against = "–"
        if row.method != rival and rival in estimates:
            apart = subtract_scores(row.by_seed, entry.row(rival).by_seed)
            against = format_paired(estimate_mean(apart)) if apart else "–"
        upload = "–" if row.upload is None else format_bytes(row.upload)
        rates = "–" if row.rates is None else f"{row.rates[0]:g} {row.rates[1]:g}"
        rows.append((cut(row.method, LONG), _write(estimates[row.method]), against, percent(worst), upload, rates))
    columns = ("method", "score", f"against {rival}", "worst decile", "sent a round", "rates of A, B")
    return Table(f"{entry.benchmark}, version {entry.version}", columns, tuple(rows), frozenset({0}), _note(entry))


def _write(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{100 * estimate.mean:.1f}"
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _note(entry: Entry) -> str:
    count = len(entry.seeds)
    planned = find_benchmark(entry.benchmark).seeds if entry.benchmark in list_benchmarks() else count
    seeds = format_count(count, "seed") if count == planned else f"{count} of {planned} seeds"
    found = [str(entry.machine[name]) for name in ("platform", "devices") if name in entry.machine]
    setup, package, jax, *machine = (cut(text, LONG) for text in (entry.setup, entry.package, entry.jax, *found))
    marks = ", ".join(f"{mark} {meaning}" for meaning, mark in MARKS.items())
    return (
        f"{cut(find_measure(entry.metric).label, LONG)} on test in per cent, mean over clients and {seeds}, with its "
        f"95 % t-interval over {'seeds' if count > 1 else 'clients'}; differences on the same clients and seeds "
        f"({marks}). Set-up {setup}; fedvlm-jax {package}, jax {jax}; {', '.join(machine)}; "
        f"{format_duration(entry.seconds)} of training."
    )


def tabulate_verdicts(benchmark: Benchmark, verdicts: Sequence[Verdict]) -> Table:
    """Tabulate which rows of a line come out again."""
    rows = [
        (
            verdict.method,
            _write(verdict.claimed),
            f"seed{'s'[: len(verdict.seeds) > 1]} {' '.join(map(str, verdict.seeds))}",  # a bare 0 reads as none
            points(verdict.difference),
            "yes" if verdict.reproduced else "NO",
        )
        for verdict in verdicts
    ]
    columns = ("method", "the line's score", "rerun", "rerun minus line, points", "within the interval")
    note = "The difference is that of the rerun seeds; the line's mean, moved by it, must stay in the line's interval."
    return Table(f"{benchmark.name}: the line rerun", columns, tuple(rows), note=note)


def write_board(file: Path) -> str:
    """Write all lines of a file in Markdown, by benchmark; those of another set-up or metric are only counted.

    Raises:
        UserError: as `read_entries`.
    """
    entries = read_entries(file) if file.stat().st_size else []
    parts = list[str]()
    for name in list_benchmarks():
        benchmark = find_benchmark(name)
        parts += [f"### {name}", benchmark.about]
        lines = [entry for entry in entries if entry.benchmark == name]
        current = [entry for entry in lines if (entry.setup, entry.metric) == (benchmark.setup, benchmark.metric)]
        parts += [to_markdown(tabulate_entry(entry)) for entry in current] or ["Nobody has entered a line yet."]
        if others := len(lines) - len(current):
            parts.append(f"{format_count(others, 'line')} of other set-ups: not comparable, and not shown.")
    return "\n\n".join(parts)
