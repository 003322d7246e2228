"""The report of a run, of several runs, or of a comparison: `report.html`, `report.md` and `figures/*.png`."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm_jax.config.option_checks import plain
from fedvlm_jax.config.run_options import Run, describe_method, to_json
from fedvlm_jax.data.config import PLANNED
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, judge, order_by_mean, spread
from fedvlm_jax.privacy.budget import describe_subject
from fedvlm_jax.reporting.audit_report import describe_audit, read_audit, tabulate_audit
from fedvlm_jax.reporting.example_cards import read_cards
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.audit_figures import draw_audit
from fedvlm_jax.reporting.figures.comparison_figures import draw_comparison
from fedvlm_jax.reporting.figures.cost_pareto_figures import draw_costs
from fedvlm_jax.reporting.figures.diagnostics_figures import draw_comparison_health, draw_run_health
from fedvlm_jax.reporting.figures.run_figures import draw_run
from fedvlm_jax.reporting.figures.selection_figures import draw_selection
from fedvlm_jax.reporting.pages import Facts, Report, Section, render
from fedvlm_jax.reporting.privacy_report import show_privacy
from fedvlm_jax.reporting.score_tables import read_scores, tabulate_comparison, tabulate_run, tabulate_runs
from fedvlm_jax.reporting.sentences import describe_attack, describe_comparison, describe_run, describe_runs
from fedvlm_jax.reporting.tables import MARKS, format_bytes, format_duration, points
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.reader import (
    ComparisonRecord,
    RunRecord,
    find_deployment,
    is_comparison,
    read_comparison,
    read_run,
)
from fedvlm_jax.utils.files import write_text

BEST = 5  # of many methods, so many have their figure at the top of the page
HEALTH = "The health of the aggregation"
SPLITS = {"train": "training", "validation": "validation", "test": "test"}
UNSTORED = ("out", "resume")  # options that say where a run lies, not what it is


def write_report(folders: Sequence[Path]) -> Path:
    """Write the report of a run, of several, or of a comparison into its folder, or beside the first of several.

    Returns:
        The HTML page.

    Raises:
        UserError: a folder is not what it should be, or a comparison is among several folders.
    """
    if not folders:
        raise UserError("a report needs the folder of a run or of a comparison")
    first = folders[0]
    if len(folders) == 1:
        record = read_comparison(first) if is_comparison(first) else read_run(first)
        with Claim(first):
            report = _report_comparison(record) if isinstance(record, ComparisonRecord) else _report_run(record)
            return _write(report, first)
    if any(is_comparison(folder) for folder in folders):
        raise UserError("a comparison is reported by itself: give its folder alone")
    records = [read_run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice: name every folder once")
    target = first.parent / f"report-{first.name}-and-{len(folders) - 1}-more"
    with Claim(target):
        return _write(_report_runs(records, target), target)


def _write(report: Report, target: Path) -> Path:
    for name in ("report.md", "report.html"):
        write_text(target / name, render(f"{name}.j2", report=report, folder=target))
    return target / "report.html"


def _report_run(record: RunRecord) -> Report:
    before, after = summarise(record.scores("zero_shot")), summarise(record.scores("personal"))
    figures = [
        (percent(after.mean), "personal models, mean of clients"),
        (percent(before.mean), "zero-shot"),
        (percent(after.worst_decile), "worst tenth of clients"),
    ]
    # Of the first round, for in the last one there may be nothing but local fine-tuning.
    if record.rounds and (sent := record.rounds[0].get("bytes_up_per_client")) is not None:
        figures.append((format_bytes(sent), "sent per client and round"))
    if private := record.results.get("privacy"):
        figures.append((f"ε {private['epsilon']:.3g}", f"at δ {private['delta']:g}, {describe_subject(private)}"))
    examples = _show_examples(record.folder)  # a damaged file is reported before anything is drawn
    results = Section(
        title="What came out",
        sentences=describe_run(record),
        tables=tabulate_run(record),
        pictures=draw_run(record, record.folder),
    )
    health = Section(title=HEALTH, pictures=draw_run_health(record, record.folder))
    audit = _show_audit(record.folder)
    return Report(
        title=f"fedvlm: {record.method}",
        subtitle=f"{_name_subject(record.config)}seed {record.options.get('seed')}",
        figures=figures,
        sections=[
            results,
            show_privacy([record], record.folder),
            _show_trust(record),
            examples,
            health,
            audit,
            _show_making(record),
        ],
    )


def _report_runs(records: Sequence[RunRecord], target: Path) -> Report:
    figures = []
    sections = [Section(title="Side by side", sentences=describe_runs(records), tables=[tabulate_runs(records)])]
    for number, record in enumerate(records):
        name = record.folder.name
        figures.append((percent(summarise(record.scores("personal")).mean), f"{record.method}, {name}"))
        private = show_privacy([record], target, f"{number}-")
        pictures = [*draw_run(record, target, f"{number}-"), *draw_run_health(record, target, f"{number}-")]
        pictures += private.pictures
        made = _show_making(record)
        # The last sentence compares one run with training alone, which the tables of several runs do not show.
        sentences = [*describe_run(record)[:-1], *private.sentences, *made.sentences]
        sections.append(
            dataclasses.replace(made, title=f"{name} ({record.method})", sentences=sentences, pictures=pictures)
        )
    return Report(
        title=f"fedvlm: {format_count(len(records), 'run')}",
        subtitle=f"{find_measure(records[0].metric).label} on test, mean of clients",
        figures=figures,
        sections=sections,
    )


def _report_comparison(record: ComparisonRecord) -> Report:
    scores = read_scores(record)
    scores.pop("zero-shot", None)
    ranking = order_by_mean(scores, list(scores))
    best = [method for number, method in enumerate(ranking) if number < BEST or method == "local"]
    figures = []
    for method in best if len(ranking) > theme.MANY else scores:
        mean = spread([summarise(by_client).mean for by_client in scores[method].values()]).mean
        difference = compare_paired(scores[method], scores["local"]) if "local" in scores else None
        against = ""
        if difference and method != "local":
            against = f", {MARKS[judge(difference)]} {points(difference.mean)} against local"
        figures.append((percent(mean), method + against))
    runs: list[RunRecord] = []
    examples = Section(title="Examples")
    for run in record.runs:
        folder = record.folder_of(run)
        with contextlib.suppress(UserError):  # its folder may be gone
            runs.append(read_run(folder))
        if not examples.cards and run["method"] in ranking[:1]:
            examples = _show_examples(folder, f"Models of {run['method']}, seed {run['seed']}. ")
    config = runs[0].config if runs else {}
    seeds = ", ".join(map(str, record.seeds))
    how = [
        f"Seeds: {seeds}. All methods have the same clients, cohorts and initial adapter.",
        *[f"{method}: {about}" for method in record.methods if (about := describe_method(plain(method)))],
        *next((sentences for run in runs if (sentences := describe_attack(run))), []),
        *_describe_origin(runs),
        f"Adapters: `adapters` in the folder of each run, in `{record.folder}`.",
    ]
    settings = [Facts(title="Settings of the comparison", values=flatten(record.settings))] if record.settings else []
    facts = [*settings, *_list_facts(config)]
    sections = [
        Section(
            title="What came out",
            sentences=describe_comparison(record),
            tables=tabulate_comparison(record),
            pictures=draw_comparison(record, record.folder),
        ),
        Section(title="What it cost", pictures=draw_costs(record, record.folder)),
        show_privacy(runs, record.folder),
        examples,
        Section(title=HEALTH, pictures=draw_comparison_health(record, record.folder)),
        Section(title="How it was made", sentences=how, command=record.command, facts=facts),
    ]
    clients = len({client for by_seed in scores.values() for by_client in by_seed.values() for client in by_client})
    subtitle = (
        f"{_name_subject(config)}{format_count(clients, 'client')}, seed{'s'[: len(record.seeds) > 1]} {seeds}; "
        f"{find_measure(record.metric).label} on test, mean of clients"
    )
    return Report(title="fedvlm: methods side by side", subtitle=subtitle, figures=figures, sections=sections)


def _show_examples(folder: Path, whose: str = "") -> Section:
    cards, looked_at = read_cards(folder)
    if not cards:
        return Section(title="Examples")
    counts = sorted(set(looked_at.values()))
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    clients = f"each of {len(looked_at)} clients" if len(looked_at) > 1 else "one client"
    note = (
        f"{whose}Chosen by rule from the first {each} test pictures of {clients}: the first that the personal model "
        "gets right and the first that it does not, in such numbers that the share of right ones is the test accuracy, "
        "as far as these pictures allow. ✓ equal to the right answer but for case and outer punctuation; ≈ shares "
        "words with it (token F1); ✗ neither."
    )
    return Section(title="Examples", cards=cards, cards_note=note)


def _show_trust(record: RunRecord) -> Section:
    """Show what attackers came to, and whose updates a robust rule took."""
    pictures = draw_selection(record, record.folder)
    return Section(title="Hostile and unusual clients", sentences=describe_attack(record), pictures=pictures)


def _show_audit(folder: Path) -> Section:
    title, found = "What the messages tell of the clients' rows", read_audit(folder)
    if found is None:
        return Section(title=title)
    pictures = draw_audit(found, folder)
    return Section(title=title, sentences=describe_audit(found), tables=tabulate_audit(found), pictures=pictures)


def _show_making(record: RunRecord) -> Section:
    """Describe the method, the origin and the time of a run, where its adapters lie, and its options."""
    name, folder = record.options["method"], record.folder / "adapters"
    sentences = [f"{name}: {about}"] if (about := describe_method(name)) else []
    sentences += _describe_origin([record])
    if folder.is_dir():
        shared = " What left the clients is `shared.safetensors`." if (folder / "shared.safetensors").is_file() else ""
        sentences.append(f"Adapters: `{folder}`; every client's is a file in `clients/`.{shared}")
    command = record.config.get("command", "")
    return Section(title="How it was made", sentences=sentences, command=command, facts=_list_facts(record.config))


def _name_subject(config: Mapping[str, Any]) -> str:
    """Name the model and the data that a page is about, as the beginning of its subtitle."""
    options, nodes = config.get("run") or {}, find_deployment(config)
    source = f"the rows of {nodes}" if nodes else (options.get("data") or {}).get("source")
    return f"{options.get('model')} on {source}, " if source else ""


def _describe_origin(runs: Sequence[RunRecord]) -> list[str]:
    """Describe the data, the devices, the commit and the time of runs, as far as their folders tell."""
    config = runs[0].config if runs else {}
    sentences = []
    if examples := config.get("examples"):
        parts = ", ".join(f"{examples.get(split, 0):,} for {name}" for split, name in SPLITS.items())
        sentences.append(f"Rows of all clients: {parts}.")
    machine = config.get("machine") or {}
    if devices := config.get("devices"):
        sentences.append(
            f"On {' and '.join(devices)}; {machine.get('platform')}, {format_count(machine.get('cores') or 1, 'core')}."
        )
    if commit := config.get("commit"):
        sentences.append(f"Commit {commit}.")
    if started := [run.config["started"] for run in runs if run.config.get("started")]:
        # The sum of all rounds, for a resumed run has waited between them.
        seconds = sum(line.get("seconds") or 0.0 for run in runs for line in run.rounds)
        whose = "its rounds" if len(runs) == 1 else f"the rounds of all {len(runs)} runs"
        first = min(started).replace("T", " ")
        sentences.append(f"Started {first}; {whose} took {format_duration(seconds)} in all.")
    return sentences


def _list_facts(config: Mapping[str, Any]) -> list[Facts]:
    facts = []
    if config.get("run"):
        options = {name: value for name, value in config["run"].items() if name not in UNSTORED}
        if find_deployment(config):  # whose server has no data
            options["data"] = {name: value for name, value in options["data"].items() if name in PLANNED}
        stored = flatten(options)
        default = {**flatten(to_json(Run(method=config["run"]["method"]))), "method": Run().method}
        marked = frozenset(name for name, value in stored.items() if default.get(name) != value)
        facts.append(Facts(title="Options (bold: not the default)", values=stored, marked=marked))
    for title, key in (("Resolved when it ran", "resolved"), ("Versions", "versions")):
        if config.get(key):
            facts.append(Facts(title=title, values=flatten(config[key])))
    return facts


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Write nested values as texts, by the path to each.

    >>> flatten({"lora": {"rank": 8, "ranks": [2, 4]}, "out": None})
    {'lora.rank': '8', 'lora.ranks': '2, 4', 'out': '–'}
    """
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = "–" if value is None else str(value)
    return flat
