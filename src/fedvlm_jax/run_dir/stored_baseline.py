"""The stored local baseline of a run, read where it still fits the run: same clients, budget, data and base."""

from typing import Any

from fedvlm_jax.run_dir.reader import RunRecord, read_run

BASELINE = "baseline"
"""Folder in a run's, of the run that trained the same clients alone."""

SAME = (
    "model",
    "image_size",
    "image_tiles",
    "image_pixels",
    "objective",
    "cohort",
    "seed",
    "data",
    "preference",
    "participation",
    "lora",
)
"""Options that both have alike, beside those of training; averages have weights, and training alone has none."""


def read_baseline(record: RunRecord) -> RunRecord | None:
    """Read the run inside a run's folder that trained the same clients alone, which `fedvlm train` makes.

    Returns:
        None where there is none, where it is not finished, or where it had another budget than the run has now, or
        other data or another base.

    Raises:
        UserError: a file of it is damaged.
    """
    folder = record.folder / BASELINE
    if not (folder / "results.json").is_file():
        return None
    alone = read_run(folder)
    alike = all(_read(alone, name) == _read(record, name) for name in SAME)
    budgets = [{**(one.options.get("train") or {}), "weighting": None} for one in (record, alone)]
    sources = [one.config.get("fingerprint") for one in (record, alone)]
    return alone if alike and budgets[0] == budgets[1] and sources[0] == sources[1] else None


def _read(record: RunRecord, name: str) -> Any:
    value = record.options.get(name)
    # Of who trains alone nothing is sent that an attack could change; who would attack is left out of both's scores.
    return {**value, "attack": None} if name == "participation" and isinstance(value, dict) else value
