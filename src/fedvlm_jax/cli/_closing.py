"""The last lines of `fedvlm train`: what came out, beside what it is to be held against, and the next command."""

import shlex
from typing import Any

from fedvlm_jax.cli._flags import flatten, name_flag
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import compare_paired
from fedvlm_jax.reporting.tables import format_paired
from fedvlm_jax.training.config import Run, to_json
from fedvlm_jax.training.run_dir.reader import RunRecord, read_baseline

__all__ = ["close_run", "suggest_comparison"]

NOT_TAKEN = ("method", "out", "resume", "train.finetune_steps", "evaluation.neighbours", "evaluation.test")
"""Options of a run that `fedvlm compare` has from elsewhere."""


def close_run(record: RunRecord) -> list[str]:
    """Put zero-shot, training alone and the method side by side, one line each."""
    alone = read_baseline(record)
    own = record.scores("personal")
    lines = {"zero-shot": percent(summarise(record.scores("zero_shot")).mean)}
    against = ""
    if alone is not None and (theirs := alone.scores("personal", record.metric)):
        lines["training alone"] = percent(summarise(theirs).mean)
        paired = format_paired(compare_paired({0: own}, {0: theirs}))
        against = f"  {paired} against training alone, in points; 95 % interval over clients, one seed"
    lines[record.method] = percent(summarise(own).mean) + against
    width = max(map(len, lines))
    title = f"{find_measure(record.metric).label} on test, mean of {len(own)} clients"
    return [title, *(f"  {name:<{width}}  {value}" for name, value in lines.items())]


def suggest_comparison(record: RunRecord) -> str:
    """Write the command that compares the run's method with training alone, over several seeds."""
    stored, default = flatten(record.options), flatten(to_json(Run()))
    method = record.method.removesuffix("+knn") if "+ft" in record.method else record.method
    words = ["fedvlm", "compare", "--methods", *dict.fromkeys(("local", method)), "--seeds", "5"]
    if method.endswith("+ft"):
        words += ["--finetune-steps", str(stored["train.finetune_steps"])]
    if method.endswith("+knn"):
        words += ["--neighbours", str(stored["evaluation.neighbours"])]
    for name, value in stored.items():
        if name not in NOT_TAKEN and name in default and value != default[name]:
            words += _write_flag(name, value)
    return shlex.join(words)


def _write_flag(name: str, value: Any) -> list[str]:
    flag = name_flag(name)
    if isinstance(value, bool):
        group, _, last = flag.rpartition(".")
        return [flag] if value else [f"{group}.no-{last}" if group else f"--no-{flag[2:]}"]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]
