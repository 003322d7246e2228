"""Tables of scores: of a run, of several runs, and of a comparison."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import MEASURES, Measure, find_measure, order_measures, percent
from fedvlm_jax.evaluation.statistics.over_clients import gain_by_client, summarise, summarise_matrix
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, estimate_mean, order_by_mean, spread
from fedvlm_jax.reporting.tables import MANY, MARKS, Table, format_bytes, format_paired, keep_ends, points
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord
from fedvlm_jax.run_dir.stored_baseline import read_baseline

MANY_METHODS = 8  # above so many methods they are listed best first, and go down a table that else has them across
# The methods that every method is compared with, client by client: the two that are hard to beat.
RIVALS = ("local", "fedavg-lora+ft")


def read_scores(record: ComparisonRecord) -> dict[str, dict[int, dict[str, float]]]:
    """Return method -> seed -> client -> score of every method that has scores, the frozen model (zero-shot) first."""
    scores = {method: record.scores(method) for method in ("zero-shot", *record.methods)}
    return {method: by_seed for method, by_seed in scores.items() if by_seed}


def tabulate_run(record: RunRecord) -> list[Table]:
    """Tabulate a run: zero-shot against the personal models, by the metric that judges and by all others; clients."""
    held_out = record.results.get("held_out") or {}
    named = {
        "zero_shot": "zero-shot",
        "alone": "training alone (local)",
        "global": "global model",
        "personal": f"personal ({record.method})",
        "held_out/zero_shot": "held-out clients, zero-shot",
        "held_out/personal": f"held-out clients, cold start ({held_out.get('cold_start', '')})",
    }
    scores = {model: record.scores(model) for model in named}
    if alone := read_baseline(record):
        scores["alone"] = alone.scores("personal", record.metric)
    models = {model: label for model, label in named.items() if scores[model]}
    title = (
        f"{_capitalise(find_measure(record.metric).label)} on test, {format_count(len(scores['personal']), 'client')}"
    )
    tables = [
        _tabulate_models(title, models, scores),
        _tabulate_metrics(record, {model: label for model, label in models.items() if model != "alone"}),
        _tabulate_clients(find_measure(record.metric), scores["zero_shot"], scores["personal"]),
        _tabulate_matrix(record),
    ]
    return [table for table in tables if table.rows]


def tabulate_runs(records: Sequence[RunRecord]) -> Table:
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
    """Tabulate a comparison: one row per method, zero-shot first; then all other metrics."""
    scores = read_scores(record)
    methods = order_by_mean(scores, list(scores)) if len(scores) > MANY_METHODS else list(scores)
    rivals = [rival for rival in RIVALS if rival in scores]
    rows, means = [], []
    for method in methods:
        summaries = [summarise(by_client) for by_client in scores[method].values()]
        accuracy = spread([summary.mean for summary in summaries])
        worst = spread([summary.worst_decile for summary in summaries])
        means.append(accuracy.mean)
        against = [
            "–" if method == rival else format_paired(compare_paired(scores[method], scores[rival])) for rival in rivals
        ]
        sent = [run["bytes_up_per_client"] for run in record.runs if run["method"] == method]
        upload = format_bytes(sum(sent) / len(sent)) if sent else "–"
        around = "" if accuracy.std is None else f" ± {100 * accuracy.std:.1f}"
        rows.append((method, f"{100 * accuracy.mean:.1f}{around} %", percent(worst.mean), *against, upload))
    seeds = format_count(len(record.seeds), "seed")
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


def _tabulate_models(title: str, models: Mapping[str, str], scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Tabulate the metric that judges, model by model: its spread over clients, and the gain over zero-shot."""
    rows = []
    for model, label in models.items():
        summary = summarise(scores[model])
        base = scores["held_out/zero_shot" if model.startswith("held_out") else "zero_shot"]
        written = "–"
        if not model.endswith("zero_shot") and (gains := gain_by_client(scores[model], base)):
            gain = estimate_mean({0: gains})
            interval = f" [{points(gain.low)}, {points(gain.high)}]" * (not math.isnan(gain.low))  # one client has none
            written = points(gain.mean) + interval
        figures = (summary.mean, summary.std, summary.min, summary.worst_decile)
        jain = "–" if math.isnan(summary.jain) else f"{summary.jain:.3f}"
        rows.append((label, *map(percent, figures), jain, written))
    columns = ("model", "mean", "std", "min", "worst decile", "Jain", "gain over zero-shot")
    strong = frozenset(number for number, model in enumerate(models) if model == "personal")
    note = (
        "Spread over clients; Jain: fairness index, 1 where all are alike, none where all are zero; gain in points "
        "with its 95 % t-interval over clients."
    )
    return Table(title, columns, tuple(rows), strong, note)


def _tabulate_metrics(record: RunRecord, models: Mapping[str, str]) -> Table:
    rows = []
    for measure in order_measures(record.metrics()):
        if measure.name != record.metric:
            scores = [record.scores(model, measure.name) for model in models]
            means = [summarise(by_client).mean if by_client else math.nan for by_client in scores]
            rows.append((measure.label, *map(measure.write, means)))
    return Table("Other metrics on test, mean over clients", ("metric", *models.values()), tuple(rows))


def _tabulate_all_metrics(record: ComparisonRecord, methods: list[str]) -> Table:
    names = {name for run in record.runs for name, values in (run.get("test") or {}).items() if values}
    rows: list[tuple[str, ...]] = [("metric", *methods)]
    for measure in order_measures(names - {record.metric}):
        means = []
        for method in methods:
            by_seed = record.scores(method, measure.name).values()
            means.append(spread([summarise(scores).mean for scores in by_seed]).mean if by_seed else math.nan)
        rows.append((measure.label, *map(measure.write, means)))
    if len(methods) > MANY_METHODS and len(rows) > 1:
        rows[0] = ("method", *methods)
        rows = list(zip(*rows, strict=True))
    return Table("Other metrics on test, mean over clients and seeds", rows[0], tuple(rows[1:]))


def _tabulate_matrix(record: RunRecord) -> Table:
    stored = record.results.get("cross_clients") or {}  # empty where it was not asked for
    rows = []
    for name, values in stored.items():
        if name in MEASURES:
            measure = MEASURES[name]
            matrix = summarise_matrix(np.asarray(values), stored["clients"], measure.higher)
            row = (measure.write(matrix.diagonal), measure.write(matrix.off_diagonal), percent(matrix.unbeaten))
            rows.append((measure.label, *row, str(len(matrix.beaten))))
    columns = ("metric", "own model", "others' models", "own is best", "better off with another's")
    return Table("Every client's model on every client's test data", columns, tuple(rows))


def _tabulate_clients(measure: Measure, zero_shot: Mapping[str, float], personal: Mapping[str, float]) -> Table:
    change = f"{_capitalise(measure.label)} per client, zero-shot → personal"
    split = {client: client.rsplit("-", 1) for client in personal if "-" in client}
    rows = list(dict.fromkeys(parts[0] for parts in split.values()))
    columns = list(dict.fromkeys(parts[1] for parts in split.values()))
    # Names like `noto-en` are a grid of two keys.
    if len(split) == len(personal) and 1 < len(columns) <= 8 and 1 < len(rows) <= MANY:
        cells = {client: f"{_short(zero_shot.get(client))} → {_short(personal[client])}" for client in personal}
        grid = tuple((row, *(cells.get(f"{row}-{column}", "") for column in columns)) for row in rows)
        return Table(f"{change} (%)", ("", *columns), grid)
    order = sorted(personal, key=lambda client: personal[client], reverse=True)
    listed = [(client, percent(zero_shot.get(client, math.nan)), percent(personal[client])) for client in order]
    shown, note = keep_ends(listed, "best and the worst")
    return Table(change, ("client", "zero-shot", "personal"), tuple(shown), note=note)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"
