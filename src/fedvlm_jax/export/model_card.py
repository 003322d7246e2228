"""A model card, `README.md`, for every folder that is exported: what it is, how it is loaded, what it scored."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, order_measures
from fedvlm_jax.export.exported_run import ExportedRun
from fedvlm_jax.reporting.tables import Table, to_markdown
from fedvlm_jax.utils.files import write_text
from fedvlm_jax.utils.untrusted_text import escape_markdown

LISTED = 100
"""Clients that a table shows."""

_HEAD = """---
{base}
library_name: {library}
tags: [fedvlm-jax, federated-learning, {method}]
# To be filled in: the licences of the base model and of the data hold for this model, too.
license: other
license_name: to-be-filled-in
---
"""


def _describe_privacy(stored: Mapping[str, Any] | None) -> list[str]:
    if not stored:
        return []
    return [
        f"- Differential privacy of clients: epsilon {stored['epsilon']:.3g} at delta {stored['delta']:g}, of "
        f"{stored['covers']}. Not covered: {stored['does_not_cover']}."
    ]


def write_card(
    folder: Path, run: ExportedRun, title: str, about: str, loading: str, library: str, base: str,
    tables: Sequence[Table],
) -> None:  # fmt: skip
    """Write `README.md` into an exported folder.

    Args:
        title: whose model it is; a stranger's text.
        about: sentences in Markdown.
        loading: lines of Python that load it.
        library: `peft` or `transformers`.
        base: name or folder of the base.
        tables: its scores.
    """
    # The hub takes no card whose base is none of its own.
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    name = f"base_model: {json.dumps(base)}" if known else "# base_model: to be filled in with the base's hub id"
    results = run.record.results
    chosen = "the last" if results.get("privacy") else f"chosen by {run.record.metric} on validation"
    lines = [
        _HEAD.format(base=name, library=library, method=run.run.method),
        f"# {escape_markdown(title)}",
        "",
        about,
        "",
        "```python",
        loading,
        "```",
        "",
        f"- Base: {escape_markdown(base if known else Path(base).name)}",
        f"- Data: {escape_markdown(Path(run.run.data.source).name)}",
        f"- Method: {run.record.method}, the models of round {results.get('selected_round')}, {chosen}"
        + ("" if results.get("privacy") else f"; seed {run.run.seed}"),  # from which noise may come
        *_describe_privacy(results.get("privacy")),
        "- Licence: to be filled in, here and above. That of the base and that of the data hold for this model, too.",
        "- What it must not be used for, and whose data it was trained on: to be filled in.",
        "",
    ]
    shown = [line for table in tables for line in (to_markdown(table), "")]
    write_text(folder / "README.md", "\n".join([*lines, *(shown or ["No score was kept of it.", ""])]))


def tabulate_metrics(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Table]:
    """Tabulate a client's scores, heading -> split -> metric -> score: metrics down, models and splits across."""
    columns = [(heading, split) for heading, by_split in scores.items() for split in by_split]
    if not columns:
        return []
    rows = list[tuple[str, ...]]()
    for measure in order_measures({name for heading, split in columns for name in scores[heading][split]}):
        cells = [scores[heading][split].get(measure.name) for heading, split in columns]
        rows.append((measure.label, *("–" if value is None else measure.write(value) for value in cells)))
    return [Table("Scores", ("metric", *(f"{heading}, {split}" for heading, split in columns)), tuple(rows))]


def tabulate_clients(run: ExportedRun, folders: Mapping[str, str], models: Mapping[str, str]) -> list[Table]:
    """Tabulate the metric by which the run chose its models, on test: clients down, models across.

    Args:
        run: whose scores.
        folders: clients -> what else a row says of them, in the table's second column; "" for nothing.
        models: heading -> `zero_shot`, `global` or `personal`.
    """
    measure, rows = find_measure(run.record.metric), list[tuple[str, ...]]()
    for name, inside in folders.items():
        found = [run.scores(model, name).get("test", {}).get(measure.name) for model in models.values()]
        cells = ["–" if value is None else measure.write(value) for value in found]
        rows.append((name, *([inside] if inside else []), *cells))
    if not rows or not any(cell != "–" for row in rows for cell in row[-len(models) :]):
        return []
    more = f"; the first {LISTED} of {len(rows)} clients" if len(rows) > LISTED else ""
    heads = ("client", *(["folder"] if any(folders.values()) else []), *models)
    left = frozenset({1} if any(folders.values()) else ())
    return [Table(f"{measure.label} on test{more}", heads, tuple(rows[:LISTED]), prose=left)]
