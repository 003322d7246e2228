"""Tables of scores: of a run, of several runs, and of a comparison."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedvlm_jax.evaluation.metrics.metric_labels import MEASURES, Measure, find_measure, order_measures, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise, summarise_gain, summarise_matrix
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, order_by_mean, spread
from fedvlm_jax.reporting.tables import MANY, MARKS, Table, format_bytes, format_paired, points
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord, read_baseline

MANY_METHODS = 8
"""Above so many methods they are listed best first, and go down a table that else has them across."""

ALONE = "alone"
"""The key of a run's baseline, the same clients trained alone, among its models."""

RIVALS = ("local", "fedavg-lora+ft")
"""The methods that every method is compared with, client by client: the two that are hard to beat."""


def tabulate_run(record: RunRecord) -> list[Table]:
    """Tabulate a run: zero-shot against the personal models, by the metric that judges and by all others; clients."""
    clients = _tabulate_clients(find_measure(record.metric), record.scores("zero_shot"), record.scores("personal"))
    matrix = _tabulate_matrix(record)
    tables = [_tabulate_models(record), _tabulate_metrics(record), clients, matrix]
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
    """List label and key of the models that were scored; held-out clients come last."""
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
    """Tabulate the metric that judges: its spread over clients, and the gain over zero-shot."""
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
    """Tabulate all the other metrics, means over clients."""
    models = _name_models(record)
    measures = [measure for measure in order_measures(record.metrics()) if measure.name != record.metric]
    rows = []
    for measure in measures:
        scores = [record.scores(model, measure.name) for _, model in models]
        rows.append((measure.label, *(measure.write(summarise(own).mean) if own else "–" for own in scores)))
    columns = ("metric", *(label for label, _ in models))
    return Table("Other metrics on test, mean over clients", columns, tuple(rows))


def _tabulate_all_metrics(record: ComparisonRecord, methods: list[str]) -> Table:
    """Tabulate every other metric of every method, mean over clients, then over seeds."""
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
    """Tabulate the cross-client matrix, metric by metric; empty where it was not asked for."""
    stored = record.results.get("cross_clients") or {}
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
