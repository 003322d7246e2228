"""The last lines of `fedvlm train`: what came out, beside what it is to be held against, and the next command."""

import shlex
from pathlib import Path
from typing import Any

from fedvlm_jax.config.run_options import Run, from_json
from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired
from fedvlm_jax.privacy.budget import describe_subject
from fedvlm_jax.reporting.tables import format_paired
from fedvlm_jax.run_dir.reader import RunRecord
from fedvlm_jax.run_dir.stored_baseline import read_baseline
from fedvlm_jax.training.tracking.base import read_records
from fedvlm_jax.utils.option_ranges import list_options

# Options of a run that `fedvlm compare` has from elsewhere.
NOT_TAKEN = ("--method", "--out", "--resume", "--train.finetune-steps", "--evaluation.neighbours", "--evaluation.test")


def close_run(record: RunRecord) -> list[str]:
    """Put zero-shot, training alone and the method side by side, one line each."""
    alone = read_baseline(record)
    personal = record.scores("personal")
    lines = {"zero-shot": percent(summarise(record.scores("zero_shot")).mean)}
    against = ""
    if alone is not None and (theirs := alone.scores("personal", record.metric)):
        lines["training alone"] = percent(summarise(theirs).mean)
        paired = format_paired(compare_paired({0: personal}, {0: theirs}))
        against = f"  {paired} against training alone, in points; 95 % interval over clients, one seed"
    lines[record.method] = percent(summarise(personal).mean) + against
    width = max(map(len, lines))
    title = f"{find_measure(record.metric).label} on test, mean of {format_count(len(personal), 'client')}"
    if private := record.results.get("privacy"):
        title += f"; epsilon {private['epsilon']:.3g} at delta {private['delta']:g}, {describe_subject(private)}"
    # Late, for it draws.
    from fedvlm_jax.reporting.privacy_report import describe_noise

    noise = describe_noise(record) if record.results.get("privacy") else []
    return [title, *(f"  {name:<{width}}  {value}" for name, value in lines.items()), *noise]


def suggest_comparison(record: RunRecord) -> str:
    """Write the command that compares the run's method with training alone, over several seeds."""
    run = from_json(record.options)
    default = {option.flag: option.value for option in list_options(Run())}
    method = record.method.removesuffix("+knn") if "+ft" in record.method else record.method
    words = ["fedvlm", "compare", "--methods", *dict.fromkeys(("local", method)), "--seeds", "5"]
    if method.endswith("+ft"):
        words += ["--finetune-steps", str(run.train.finetune_steps)]
    if method.endswith("+knn"):
        words += ["--neighbours", str(run.evaluation.neighbours)]
    for flag, value, standard, _ in list_options(run):
        said = value != default.get(flag, standard) or flag == "--data.form"  # which a folder may not show
        if said and flag not in NOT_TAKEN:
            words += _write_flag(flag.replace("--method.", f"--method.{run.method}."), value)
    vectors = (record.config.get("resolved") or {}).get("prompt_vectors")
    if vectors and run.soft_prompt.vectors is None:  # the method's own number, which training alone is to have too
        words += _write_flag("--prompt.vectors", vectors)
    return shlex.join(words)


def describe_trackers(folder: Path) -> list[str]:
    """Say where the run can be looked at, a line for each tracker that has it whole."""
    return [f"track   {record.view}" for record in read_records(folder) if record.results and not record.fault]


def _write_flag(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, _, last = flag.rpartition(".")
        return [flag] if value else [f"{group}.no-{last}" if group else f"--no-{flag[2:]}"]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
