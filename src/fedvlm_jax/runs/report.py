"""The report of a run, of several runs, or of a comparison: `report.html`, `report.md` and `figures/*.png`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.spread import summarise
from fedvlm_jax.runs import heatmaps, plots
from fedvlm_jax.runs.config import Run, to_json
from fedvlm_jax.runs.folders import ComparisonRecord, RunRecord, is_comparison, read_comparison, read_run
from fedvlm_jax.runs.measures import find_measure, percent
from fedvlm_jax.runs.page import Facts, Picture, Report, Section, to_markdown_page, to_page
from fedvlm_jax.runs.statistics import compare_paired, judge, spread
from fedvlm_jax.runs.tables import (
    MARKS,
    format_bytes,
    points,
    tabulate_comparison,
    tabulate_run,
    tabulate_runs,
)
from fedvlm_jax.runs.theme import PAPER, PLACEHOLDERS, save_png, to_svg
from fedvlm_jax.runs.wording import describe_comparison, describe_run, describe_runs

__all__ = ["write_report"]

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
        report = _report_runs([read_run(folder) for folder in folders], target)
    elif is_comparison(folders[0]):
        target = folders[0]
        report = _report_comparison(read_comparison(target), target)
    else:
        target = folders[0]
        report = _report_run(read_run(target), target)
    target.mkdir(parents=True, exist_ok=True)
    (target / "report.md").write_text(to_markdown_page(report), encoding="utf-8")
    page = target / "report.html"
    page.write_text(to_page(report), encoding="utf-8")
    return page


def _report_run(record: RunRecord, target: Path) -> Report:
    before, after = summarise(record.scores("zero_shot")), summarise(record.scores("personal"))
    last = record.rounds[-1] if record.rounds else {}
    sent = last.get("bytes_up_per_client")
    figures = [
        (percent(after.mean), "personal models, mean of clients"),
        (percent(before.mean), "zero-shot"),
        (percent(after.worst_decile), "worst tenth of clients"),
        *([(format_bytes(sent), "sent per client and round")] if sent is not None else []),
    ]
    sections = [
        Section("What came out", describe_run(record), tabulate_run(record), _draw_run(record, target, "")),
        Section("How it was made", _describe_origin(record.config), facts=_list_facts(record.config)),
    ]
    data = record.options.get("data") or {}
    subtitle = f"{record.options.get('model')} on {data.get('source')}, seed {record.options.get('seed')}"
    return Report(f"fedvlm: {record.method}", subtitle, figures, sections)


def _report_runs(records: Sequence[RunRecord], target: Path) -> Report:
    sections = [Section("Side by side", describe_runs(records), [tabulate_runs(list(records))])]
    for number, record in enumerate(records):
        pictures = _draw_run(record, target, f"{number}-")
        title = f"{record.folder.name} ({record.method})"
        sections.append(Section(title, describe_run(record)[:-1], pictures=pictures, facts=_list_facts(record.config)))
    figures = [
        (percent(summarise(record.scores("personal")).mean), f"{record.method}, {record.folder.name}")
        for record in records
    ]
    return Report(
        f"fedvlm: {len(records)} runs",
        f"{find_measure(records[0].metric).label} on test, mean of clients",
        figures,
        sections,
    )


def _report_comparison(record: ComparisonRecord, target: Path) -> Report:
    scores = {method: record.scores(method) for method in record.methods}
    figures = []
    for method in (method for method in record.methods if scores[method]):
        mean = spread([summarise(one).mean for one in scores[method].values()]).mean
        difference = compare_paired(scores[method], scores["local"]) if scores.get("local") else None
        mark = MARKS[judge(difference)] if difference else ""
        against = f", {mark} {points(difference.mean)} against local" if difference and method != "local" else ""
        figures.append((percent(mean), method + against))
    pictures = [
        _draw(
            target,
            "methods",
            "Dots are clients, mean over seeds. First: accuracy, the bar is the mean of all. Then: differences to "
            "local training, with their mean and its 95 % interval.",
            lambda *how: plots.draw_methods(record, *how),
        ),
        _draw(
            target,
            "clients",
            f"{find_measure(record.metric).label} per client, %, mean over seeds; bold: the best of a client.",
            lambda *how: heatmaps.draw_heatmap(record, *how),
        ),
    ]
    curves = plots.read_curves(record)
    if curves:
        caption = "Validation accuracy on the way, over rounds and over bytes; mean over seeds."
        pictures.append(_draw(target, "curves", caption, lambda *how: plots.draw_curves(curves, record.metric, *how)))
    config = _read_first_config(record)
    facts = [Facts("Settings of the comparison", _flatten(record.settings))] if record.settings else []
    seeds = ", ".join(map(str, record.seeds))
    how = [
        f"Seeds: {seeds}. All methods have the same clients, cohorts and initial adapter.",
        *_describe_origin(config),
    ]
    sections = [
        Section("What came out", describe_comparison(record), tabulate_comparison(record), pictures),
        Section("How it was made", how, command=record.command, facts=[*facts, *_list_facts(config)]),
    ]
    clients = len({client for by_seed in scores.values() for one in by_seed.values() for client in one})
    subtitle = f"{clients} clients, seeds {seeds}; {find_measure(record.metric).label} on test, mean of clients"
    return Report("fedvlm: methods side by side", subtitle, figures, sections)


def _draw_run(record: RunRecord, target: Path, prefix: str) -> list[Picture]:
    clients = "Every client from zero-shot (ring) to its personal model (dot); dashed: means."
    pictures = [_draw(target, f"{prefix}clients", clients, lambda *how: plots.draw_clients(record, *how))]
    if record.metric in (record.results.get("cross_clients") or {}):
        cells = f"{find_measure(record.metric).label} of every client's model (across) on every client's test data, %."
        pictures.append(_draw(target, f"{prefix}matrix", cells, lambda *how: heatmaps.draw_matrix(record, *how)))
    if record.rounds:
        rounds = "Validation after each evaluated round; dashed: before redistribution; ring: the selected round."
        pictures.append(_draw(target, f"{prefix}rounds", rounds, lambda *how: plots.draw_rounds(record, *how)))
    return pictures


def _draw(target: Path, name: str, caption: str, draw: Callable[..., Figure]) -> Picture:
    """Draw a picture three times: as a PNG file, and as wide and narrow SVG for the page."""
    save_png(draw(PAPER, False), target / "figures" / f"{name}.png")
    wide, narrow = (to_svg(draw(PLACEHOLDERS, slim), f"{name}-{slim:d}", caption) for slim in (False, True))
    return Picture(name, caption, wide, narrow)


def _read_first_config(record: ComparisonRecord) -> dict[str, Any]:
    """Take options and versions from one of the runs; they share all but method and seed."""
    for run in record.runs:
        try:
            return read_run(record.folder_of(run)).config
        except UserError:
            continue
    return {}


def _describe_origin(config: Mapping[str, Any]) -> list[str]:
    commit = config.get("commit")
    return [f"Commit {commit}."] if commit else []


def _list_facts(config: Mapping[str, Any]) -> list[Facts]:
    facts = []
    if config.get("run"):
        stored = _flatten({name: value for name, value in config["run"].items() if name not in UNSTORED})
        default = _flatten(to_json(Run()))
        marked = frozenset(name for name, value in stored.items() if default.get(name) != value)
        facts.append(Facts("Options (bold: not the default)", stored, marked))
    for title, key in (("Resolved when it ran", "resolved"), ("Versions", "versions")):
        if config.get(key):
            facts.append(Facts(title, _flatten(config[key])))
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
