"""Files of runs and comparisons, read as files of strangers.

Damage by a disk, an editor or a copy is reported in a line that names the file, and what is handed on has the form that
its readers count on.

No heavy package is imported here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedvlm_jax.config.run_options import Run, from_json
from fedvlm_jax.distributed.mesh_option import MeshShape
from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.budget import Budget
from fedvlm_jax.utils.serialization import decode, fit

EXAMPLES = "examples.json"
EXAMPLE_MODELS = {"zero_shot": "zero-shot", "global": "global model", "personal": "personal model"}
"""Models whose answers are kept beside an example -> what a reader sees."""

HEALTH = (
    *("loss", "seconds", "clients_per_second", "bytes_", "aggregation_error", "angle_", "update_", "personal_drift"),
    *("compression_error", "quantisation_error", "epsilon", "clip", "noise"),
)
"""Beginnings of the names of a line's numbers that are drawn or summed."""

Scores = dict[str, float | None]
"""client -> score."""

BySplit = dict[str, dict[str, Scores]]
"""split -> metric -> client -> score."""

Form = Mapping[str, Any]
"""The form of a JSON object: the names of its entries -> their types.

A type is a hint, or the form of an object, or `[form]` for a list of such objects; `{"*": form}` is the form of an
object whose entries all have that form. "?" after a name: the entry may be missing.
"""

ORIGIN: Form = {  # of config.json, perhaps of another version; tables and reports count on it
    "run": {"method": str, "train?": {"finetune_steps?": int}, "evaluation?": {"neighbours?": int}},
    "resolved?": {"attackers?": list[str], "answer_distances?": dict[str, float]},
    "versions?": dict[str, Any],
}
RESOLVED: Form = {"run": dict[str, Any], "resolved": {"wave": int, "clients": list[str], "mesh": dict[str, int]}}
SEALED: Form = {
    "fingerprint": {"data": str, "weights": str, "model_files": dict[str, str], "clients": dict[str, str]},
    "versions": dict[str, str | None],
}
AWAY = "away"
"""Results of a deployment: clients that were away when it ended, and so are not in them."""

PRIVACY: Form = {
    **{field.name: field.type for field in fields(Budget) if field.name != "secret"},
    **dict.fromkeys(("covers", "does_not_cover"), str),
}
RESULTS: Form = {
    "zero_shot": BySplit,
    "personal": BySplit,
    "global?": BySplit | None,
    "selected_round?": int | None,
    "selected_by?": str,
    "gain_intervals?": dict[str, dict[str, tuple[float, float]]],
    "neighbours?": dict[str, Scores | str],
    "privacy?": PRIVACY,
    "attack?": {"kind": str, "target?": str, "with_mark?": Scores, "without_mark?": Scores},
    f"{AWAY}?": list[str],
}
HELD_OUT: Form = {"held_out": {"cold_start": str, "zero_shot": BySplit, "personal": BySplit}}
LINE: Form = {
    "round": int,
    "method?": str,
    "validation?": dict[str, Any] | None,
    "pool?": str,
    "pool_withstands?": float,
    "selection?": dict[str, float],
    "left_out?": list[str],
}
VALIDATION: Form = {
    "metric": str,
    "before_redistribution": dict[str, float | None],
    "after_redistribution": dict[str, float | None],
}
ENTRY: Form = {"seed": int, "test?": dict[str, Scores] | None, "validation?": dict[str, Scores] | None}
RUN_ENTRY: Form = {
    **ENTRY,
    "method": str,
    "folder": str,
    "seconds": float,
    "bytes_up_per_client": float,
    "global?": BySplit | None,
    "selected_round?": int | None,
    "bytes_down_per_client?": float,
}
COMPARISON: Form = {
    "methods": list[str],
    "seeds": list[int],
    "runs": [RUN_ENTRY],
    "zero_shot": [ENTRY],
    "command?": str,
    "settings?": dict[str, Any] | None,
    "selected_by?": str,
}
ANSWER: Form = {"text": str, "exact_match": float, "token_f1": float}
EXAMPLE: Form = {"client": str, "picture": str, "question": str, "answer": str, "answers": {"*": ANSWER}}
EXAMPLES_FILE: Form = {"looked_at": dict[str, int], "examples": [EXAMPLE]}


@dataclass(frozen=True)
class StoredConfig:
    """The content of a run's `config.json`, and of it the options and what was resolved when the run began."""

    content: dict[str, Any]
    run: Run
    wave: int
    mesh: MeshShape
    clients: tuple[str, ...]
    budget: Budget | None = None  # of differential privacy


def parse_json(path: Path, text: str, where: str = "") -> dict[str, Any]:
    """Read a text as one JSON object.

    Raises:
        UserError: it is none; names the file, and `where` in it.

    >>> parse_json(Path("metrics.jsonl"), "[1]", ", line 3")
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: metrics.jsonl, line 3: expected a JSON object, found '[1]'
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: a million brackets
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}{where}: not readable as JSON ({reason})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}{where}: expected a JSON object, found {str(stored)[:40]!r}")
    return stored


def read_json(path: Path, form: Form) -> dict[str, Any]:
    """Read a file that holds one JSON object of a form.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    stored = parse_json(path, read_text(path))
    check_form(path, stored, form)
    return stored


def read_text(path: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        UserError: it cannot be read, has more than 1 GiB, or is no UTF-8.
    """
    try:
        # Its size comes first: a hole of any size takes a disk nothing and memory all of it.
        if (size := path.stat().st_size) > 1 << 30:
            raise UserError(f"{path}: {size:,} bytes, more than a run ever writes there; is the file damaged?")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start:,}; is the file damaged?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_config(folder: Path) -> StoredConfig:
    """Read what a run's folder says of the options and of what was resolved when it began.

    Raises:
        UserError: there is no `config.json`, or it is damaged or of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there, so it is not the folder of a run")
    stored = read_json(path, RESOLVED)
    resolved = stored["resolved"]
    mesh = resolved["mesh"]
    if not {"clients"} <= set(mesh) <= {"clients", "model"} or min(mesh.values()) < 1 or resolved["wave"] < 1:
        raise UserError(f"{path}: resolved has no mesh or wave that could be; was it written by another version?")
    try:
        run = from_json(stored["run"])
        budget = None
        if "privacy" in resolved:
            known = {**resolved["privacy"], "secret": stored.get("secret", "")}
            budget = decode(Budget, known, "resolved.privacy")
            if not re.fullmatch(r"([0-9a-f]{32})?", budget.secret):
                raise UserError("the secret is not of 32 hexadecimal digits; is the file damaged?")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return StoredConfig(stored, run, resolved["wave"], MeshShape(**mesh), tuple(resolved["clients"]), budget)


def read_results(path: Path) -> dict[str, Any]:
    """Read `results.json`, in the form that tables and pictures count on.

    Raises:
        UserError: it cannot be read, or an entry has another form.
    """
    stored = read_json(path, RESULTS)
    if stored.get("held_out") is not None:
        check_form(path, stored, HELD_OUT)
    matrix = stored.get("cross_clients")
    if matrix is None:
        return stored
    check_form(path, stored, {"cross_clients": dict[str, list[str] | list[list[float]]]})
    check_form(path, matrix, {"clients": list[str]}, before="cross_clients.")
    count = len(matrix["clients"])
    for metric in matrix.keys() - {"clients"}:
        rows = matrix[metric]
        if len(rows) != count or any(not isinstance(row, list) or len(row) != count for row in rows):
            raise UserError(f"{path}: cross_clients.{metric} is no table of {count} by {count} numbers; is it damaged?")
    return stored


def parse_line(path: Path, text: str, where: str) -> dict[str, Any]:
    """Read a line of `metrics.jsonl`, in the form that pictures and a resumed run count on.

    Raises:
        UserError: it is no JSON object, or an entry has another form; names the file, and `where` in it.
    """
    line = parse_json(path, text, where)
    check_form(path, line, {**LINE, **{name: float | None for name in line if name.startswith(HEALTH)}}, where)
    if not 1 <= line["round"] <= 10**9:
        raise UserError(f"{path}{where}: there is no round {line['round']!s:.20}; is the file damaged?")
    validation = line.get("validation") or {}
    form = {name: VALIDATION.get(name, float | None) for name in validation}  # the others are metrics
    check_form(path, validation, form, where, "validation.")
    return line


def check_form(path: Path, stored: Mapping[str, Any], form: Form, where: str = "", before: str = "") -> None:
    """See that the entries of a form are in an object, and of their types.

    Args:
        path: the file that the object was read from.
        where: in the file, for messages: ", line 3".
        before: the path of the object in what was read, for messages: "runs.0.".

    Raises:
        UserError: the first entry that is missing, or of another type.

    >>> check_form(Path("results.json"), {"runs": [{"seed": "0"}]}, {"runs": [{"seed": int}]})
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: results.json: runs.0.seed = '0'; expected int; is the file damaged?
    """
    if "*" in form:
        for name, value in stored.items():
            _check_entry(path, value, form["*"], where, before + name)
        return
    for key, kind in form.items():
        name = key.removesuffix("?")
        if name in stored:
            _check_entry(path, stored[name], kind, where, before + name)
        elif name == key:
            named = f"{path}{where}: the entry {before + name!r}"
            raise UserError(f"{named} is missing; is it damaged, or of another version?")


def _check_entry(path: Path, value: Any, kind: Any, where: str, name: str) -> None:
    plain: Any = {list: list[dict[str, Any]], dict: dict[str, Any]}.get(type(kind), kind)
    try:
        fit(plain, value, name)
    except UserError as error:
        raise UserError(f"{path}{where}: {error}; is the file damaged?") from None
    if isinstance(kind, dict):
        check_form(path, value, kind, where, f"{name}.")
    if isinstance(kind, list):
        for number, item in enumerate(value):
            check_form(path, item, kind[0], where, f"{name}.{number}.")
