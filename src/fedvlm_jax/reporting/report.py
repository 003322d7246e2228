"""The report of a run, of several runs, or of a comparison: `report.html`, `report.md` and `figures/*.png`."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm_jax.config.run_options import Run, describe_method, to_json
from fedvlm_jax.config.validation import plain
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired, judge, order_by_mean, spread
from fedvlm_jax.reporting.example_cards import read_cards
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.comparison_figures import draw_comparison
from fedvlm_jax.reporting.figures.cost_figures import draw_costs
from fedvlm_jax.reporting.figures.diagnostics import draw_comparison_health, draw_run_health
from fedvlm_jax.reporting.figures.run_figures import draw_run
from fedvlm_jax.reporting.pages import Facts, Report, Section, render
from fedvlm_jax.reporting.score_tables import tabulate_comparison, tabulate_run, tabulate_runs
from fedvlm_jax.reporting.sentences import describe_comparison, describe_run, describe_runs
from fedvlm_jax.reporting.tables import MARKS, format_bytes, format_duration, points
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord, is_comparison, read_comparison, read_run
from fedvlm_jax.utils.files import write_text

BEST = 5
"""Of many methods, so many have their figure at the top of the page."""

SPLITS = {"train": "training", "validation": "validation", "test": "test"}

UNSTORED = ("out", "resume")
"""Options that say where a run lies, not what it is."""


def write_report(folders: Sequence[Path]) -> Path:
    """Write the report, into the folder itself, or beside the first of several.

    Args:
        folders: a run's folder, several of them, or one comparison's.

    Returns:
        The HTML page.

    Raises:
        UserError: a folder is not what it should be, or a comparison is among several folders.
    """
    if not folders:
        raise UserError("a report needs the folder of a run or of a comparison")
    if len(folders) > 1 and any(is_comparison(folder) for folder in folders):
        raise UserError("a comparison is reported by itself: give its folder alone")
    if len(folders) > 1:
        target = folders[0].parent / f"report-{folders[0].name}-and-{len(folders) - 1}-more"
        records = [read_run(folder) for folder in folders]
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise UserError("a run is given twice: name every folder once")
        with Claim(target):
            return _write(_report_runs(records, target), target)
    record = read_comparison(folders[0]) if is_comparison(folders[0]) else read_run(folders[0])
    with Claim(record.folder):
        report = _report_comparison(record) if isinstance(record, ComparisonRecord) else _report_run(record)
        return _write(report, record.folder)


def _write(report: Report, target: Path) -> Path:
    for name in ("report.md", "report.html"):
        write_text(target / name, render(f"{name}.j2", report=report, folder=target))
    return target / "report.html"


def _report_run(record: RunRecord) -> Report:
    before, after = summarise(record.scores("zero_shot")), summarise(record.scores("personal"))
    first = record.rounds[0] if record.rounds else {}  # in the last one there may be nothing but local fine-tuning
    figures = [
        (percent(after.mean), "personal models, mean of clients"),
        (percent(before.mean), "zero-shot"),
        (percent(after.worst_decile), "worst tenth of clients"),
    ]
    if (sent := first.get("bytes_up_per_client")) is not None:
        figures.append((format_bytes(sent), "sent per client and round"))
    examples = _show_examples(record.folder)  # a damaged file is reported before anything is drawn
    sections = [
        Section(
            title="What came out",
            sentences=describe_run(record),
            tables=tabulate_run(record),
            pictures=draw_run(record, record.folder),
        ),
        *examples,
        *_show_health(draw_run_health(record, record.folder)),
        Section(
            title="How it was made",
            sentences=_describe_making(record),
            command=record.config.get("command", ""),
            facts=_list_facts(record.config),
        ),
    ]
    subtitle = f"{_name_subject(record.options)}seed {record.options.get('seed')}"
    return Report(title=f"fedvlm: {record.method}", subtitle=subtitle, figures=figures, sections=sections)


def _report_runs(records: Sequence[RunRecord], target: Path) -> Report:
    figures, sections = [], []
    for number, record in enumerate(records):
        mean = summarise(record.scores("personal")).mean
        figures.append((percent(mean), f"{record.method}, {record.folder.name}"))
        sections.append(
            Section(
                title=f"{record.folder.name} ({record.method})",
                sentences=[*describe_run(record)[:-1], *_describe_making(record)],
                pictures=[*draw_run(record, target, f"{number}-"), *draw_run_health(record, target, f"{number}-")],
                command=record.config.get("command", ""),
                facts=_list_facts(record.config),
            )
        )
    side = Section(title="Side by side", sentences=describe_runs(records), tables=[tabulate_runs(records)])
    return Report(
        title=f"fedvlm: {len(records)} runs",
        subtitle=f"{find_measure(records[0].metric).label} on test, mean of clients",
        figures=figures,
        sections=[side, *sections],
    )


def _report_comparison(record: ComparisonRecord) -> Report:
    scores = {method: record.scores(method) for method in record.methods}
    scores = {method: by_seed for method, by_seed in scores.items() if by_seed}
    ranking = order_by_mean(scores, list(scores))
    shown = list(scores)
    if len(ranking) > theme.MANY:
        shown = [method for number, method in enumerate(ranking) if number < BEST or method == "local"]
    figures = []
    for method in shown:
        mean = spread([summarise(one).mean for one in scores[method].values()]).mean
        difference = compare_paired(scores[method], scores["local"]) if "local" in scores else None
        against = ""
        if difference and method != "local":
            against = f", {MARKS[judge(difference)]} {points(difference.mean)} against local"
        figures.append((percent(mean), method + against))
    runs = _read_runs(record)
    config = runs[0].config if runs else {}
    seeds = ", ".join(map(str, record.seeds))
    how = [
        f"Seeds: {seeds}. All methods have the same clients, cohorts and initial adapter.",
        *[f"{method}: {about}" for method in record.methods if (about := describe_method(plain(method)))],
        *_describe_origin(config),
        *_describe_time(runs),
        f"Adapters: `adapters` in the folder of each run, in `{record.folder}`.",
    ]
    settings = [Facts(title="Settings of the comparison", values=_flatten(record.settings))] if record.settings else []
    costs = draw_costs(record, record.folder)
    sections = [
        Section(
            title="What came out",
            sentences=describe_comparison(record),
            tables=tabulate_comparison(record),
            pictures=draw_comparison(record, record.folder),
        ),
        *([Section(title="What it cost", pictures=costs)] if costs else []),
        *_show_best_examples(record, ranking),
        *_show_health(draw_comparison_health(record, record.folder)),
        Section(
            title="How it was made", sentences=how, command=record.command, facts=[*settings, *_list_facts(config)]
        ),
    ]
    clients = len({client for by_seed in scores.values() for one in by_seed.values() for client in one})
    subtitle = (
        f"{_name_subject(config.get('run') or {})}{clients} clients, seeds {seeds}; "
        f"{find_measure(record.metric).label} on test, mean of clients"
    )
    return Report(title="fedvlm: methods side by side", subtitle=subtitle, figures=figures, sections=sections)


def _show_health(pictures: Sequence[theme.Picture]) -> list[Section]:
    return [Section(title="The health of the aggregation", pictures=pictures)] if pictures else []


def _show_examples(folder: Path, whose: str = "") -> list[Section]:
    """Show the stored examples of a run, and how they were chosen."""
    cards, looked_at = read_cards(folder)
    if not cards:
        return []
    counts = sorted(set(looked_at.values()))
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    clients = f"each of {len(looked_at)} clients" if len(looked_at) > 1 else "one client"
    note = (
        f"{whose}Chosen by rule from the first {each} test pictures of {clients}: the first that the personal model "
        "gets right and the first that it does not, in such numbers that the share of right ones is the test accuracy, "
        "as far as these pictures allow. ✓ equal to the right answer but for case and outer punctuation; ≈ shares "
        "words with it (token F1); ✗ neither."
    )
    return [Section(title="Examples", cards=cards, cards_note=note)]


def _show_best_examples(record: ComparisonRecord, ranking: Sequence[str]) -> list[Section]:
    """Show the examples of the first run that stored any, of the method with the highest mean."""
    for run in record.runs:
        if run["method"] in ranking[:1]:
            whose = f"Models of {run['method']}, seed {run['seed']}. "
            if sections := _show_examples(record.folder_of(run), whose):
                return sections
    return []


def _read_runs(record: ComparisonRecord) -> list[RunRecord]:
    """Read those runs of a comparison that are still there."""
    found = []
    for run in record.runs:
        with contextlib.suppress(UserError):
            found.append(read_run(record.folder_of(run)))
    return found


def _name_subject(options: Mapping[str, Any]) -> str:
    """Name the model and the data that a page is about, as the beginning of its subtitle."""
    source = (options.get("data") or {}).get("source")
    return f"{options.get('model')} on {source}, " if source else ""


def _describe_making(record: RunRecord) -> list[str]:
    """Describe the method, the origin and the time of a run, and where its adapters lie."""
    name, folder = record.options["method"], record.folder / "adapters"
    sentences = [f"{name}: {about}"] if (about := describe_method(name)) else []
    sentences += [*_describe_origin(record.config), *_describe_time([record])]
    if folder.is_dir():
        shared = " What left the clients is `shared.safetensors`." if (folder / "shared.safetensors").is_file() else ""
        sentences.append(f"Adapters: `{folder}`; every client's is a file in `clients/`.{shared}")
    return sentences


def _describe_origin(config: Mapping[str, Any]) -> list[str]:
    """Describe the data, the devices and the commit of a run, as far as its folder tells."""
    sentences = []
    if examples := config.get("examples"):
        parts = ", ".join(f"{examples.get(split, 0):,} for {name}" for split, name in SPLITS.items())
        sentences.append(f"Rows of all clients: {parts}.")
    machine = config.get("machine") or {}
    if devices := config.get("devices"):
        sentences.append(f"On {' and '.join(devices)}; {machine.get('platform')}, {machine.get('cores')} cores.")
    if commit := config.get("commit"):
        sentences.append(f"Commit {commit}.")
    return sentences


def _describe_time(records: Sequence[RunRecord]) -> list[str]:
    """Say when the first run was started, and how long all rounds took; a resumed run has waited between them."""
    started = [record.config["started"] for record in records if record.config.get("started")]
    seconds = sum(line.get("seconds") or 0.0 for record in records for line in record.rounds)
    if not started:
        return []
    whose = "its rounds" if len(records) == 1 else f"the rounds of all {len(records)} runs"
    return [f"Started {min(started).replace('T', ' ')}; {whose} took {format_duration(seconds)} in all."]


def _list_facts(config: Mapping[str, Any]) -> list[Facts]:
    facts = []
    if config.get("run"):
        stored = _flatten({name: value for name, value in config["run"].items() if name not in UNSTORED})
        default = {**_flatten(to_json(Run(method=config["run"]["method"]))), "method": Run().method}
        marked = frozenset(name for name, value in stored.items() if default.get(name) != value)
        facts.append(Facts(title="Options (bold: not the default)", values=stored, marked=marked))
    for title, key in (("Resolved when it ran", "resolved"), ("Versions", "versions")):
        if config.get(key):
            facts.append(Facts(title=title, values=_flatten(config[key])))
    return facts


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = "–" if value is None else str(value)
    return flat
