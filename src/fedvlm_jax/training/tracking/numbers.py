"""Numbers that trackers get: of a round's line, of the results, and the options they belong to. No text of any row."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fedvlm_jax.training.tracking.base import Value

FEW = 32
"""Clients at most whose results are sent one by one."""

MODELS = ("zero_shot", "personal", "global")
NOWHERE = ("out", "resume", "system.cache_dir")
"""Options that say where something lies on this machine, and nothing else."""


def flatten_line(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of `metrics.jsonl` but for the round, which is the step; lists are counted.

    >>> flatten_line({"round": 3, "method": "plora", "loss": 0.5, "unfit": ["a"], "validation": {"token_f1": 0.25}})
    {'loss': 0.5, 'unfit': 1.0, 'validation/token_f1': 0.25}
    """
    # `selection` is by clients' names, which are nobody's business there.
    return dict(_flatten({name: value for name, value in line.items() if name not in ("round", "selection")}, ""))


def _flatten(stored: Mapping[str, Any], before: str) -> Iterator[tuple[str, float]]:
    for name, value in stored.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{before}{name}/")
        elif isinstance(value, list):
            yield f"{before}{name}", float(len(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{before}{name}", float(value)


def flatten_results(results: Mapping[str, Any], clients: Sequence[str], *, names: bool = False) -> dict[str, float]:
    """Return the means over clients of `results.json`, and of few clients what each has by the metric that chose.

    Args:
        results: the content of the file.
        clients: all of the run, in its order; numbers begin at 0.
        names: call clients by their names.

    >>> scores = {"test": {"exact_match": {"ann": 0.5, "bob": 1.0}}}
    >>> flatten_results({"selected_by": "exact_match", "personal": scores}, ["ann", "bob"])
    {'test/personal/exact_match': 0.75, 'client_0/test/personal/exact_match': 0.5, \
'client_1/test/personal/exact_match': 1.0}
    """
    found: dict[str, float] = {}
    if isinstance(results.get("selected_round"), int):
        found["selected_round"] = float(results["selected_round"])
    for before, stored in (("", results), ("held_out/", results.get("held_out") or {})):
        for model in MODELS:
            for split, metrics in (stored.get(model) or {}).items():
                for metric, scores in metrics.items():
                    if values := list(_keep_finite(scores).values()):
                        found[f"{split}/{before}{model}/{metric}"] = sum(values) / len(values)
    metric = results.get("selected_by", "exact_match")
    if len(clients) <= FEW:
        for number, client in enumerate(clients):
            label = f"client_{number}" + (f"_{_clean(client)}" if names else "")
            for model in MODELS:
                score = _keep_finite(((results.get(model) or {}).get("test") or {}).get(metric) or {}).get(client)
                if score is not None:
                    found[f"{label}/test/{model}/{metric}"] = score
    return found


def _keep_finite(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items() if value is not None and math.isfinite(value)}


def _clean(name: str) -> str:
    """Write a client's name in the letters that every tracker takes."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:60]


def list_parameters(config: Mapping[str, Any]) -> dict[str, Value]:
    """Return the options of a run's `config.json`, and what was resolved; of a path its last part.

    Options that are not set are left out.

    >>> list_parameters({"run": {"model": "/home/ann/florence", "out": "/home/ann/a", "lora": {"ranks": [2, 4]}}})
    {'model': 'florence', 'lora.ranks': '2 4'}
    """
    found = {name: value for name, value in _list_options(config["run"], "") if name not in NOWHERE}
    resolved = config.get("resolved") or {}
    for name in ("cohort", "wave", "steps", "adapter_parameters"):
        if isinstance(resolved.get(name), int):
            found[f"resolved.{name}"] = resolved[name]
    if isinstance(resolved.get("clients"), list):
        found["resolved.clients"] = len(resolved["clients"])
    for name in ("fedvlm-jax", "jax"):
        if isinstance(version := (config.get("versions") or {}).get(name), str):
            found[f"version.{name}"] = version
    if devices := config.get("devices"):
        found["devices"] = ", ".join(map(str, devices))
    return found


def _list_options(stored: Mapping[str, Any], before: str) -> Iterator[tuple[str, Value]]:
    for name, value in stored.items():
        if isinstance(value, Mapping):
            yield from _list_options(value, f"{before}{name}.")
        elif isinstance(value, list) and value:
            yield f"{before}{name}", " ".join(map(str, value))
        elif isinstance(value, str) and value:
            yield f"{before}{name}", PurePath(value).name if PurePath(value).is_absolute() else value
        elif isinstance(value, bool | int | float):
            yield f"{before}{name}", value
