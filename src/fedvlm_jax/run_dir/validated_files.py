"""Files of runs and comparisons, read as files of strangers.

Whatever a disk, an editor or a copy did to one is told in one line that names it, and what is handed on has the form
that its readers count on.

No heavy package is imported here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm_jax.config.run_options import Run, from_json
from fedvlm_jax.distributed.mesh_shape import MeshShape
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.digests import digest_parts
from fedvlm_jax.utils.serialization import fit

EXAMPLES = "examples.json"
EXAMPLE_MODELS = {"zero_shot": "zero-shot", "global": "global model", "personal": "personal model"}
"""Models whose answers are kept beside an example -> what a reader sees."""

Scores = dict[str, float | None]
"""client -> score."""

BySplit = dict[str, dict[str, Scores]]
"""split -> metric -> client -> score."""

RESULTS: dict[str, Any] = {"zero_shot": BySplit, "personal": BySplit}
MORE_RESULTS: dict[str, Any] = {
    "global": BySplit | None,
    "selected_round": int | None,
    "selected_by": str,
    "gain_intervals": dict[str, dict[str, tuple[float, float]]],
    "neighbours": dict[str, Scores | str],
}
HELD_OUT: dict[str, Any] = {"cold_start": str, "zero_shot": BySplit, "personal": BySplit}

SEAL = "digest"
"""The entry of `config.json` that holds the digest of all others."""

FINGERPRINT: dict[str, Any] = {
    "data": str,
    "weights": str,
    "model_files": dict[str, str],
    "clients": dict[str, str],
}

LINE: dict[str, Any] = {"round": int}
MORE_OF_LINE: dict[str, Any] = {"method": str, "validation": dict[str, Any] | None}
VALIDATION: dict[str, Any] = {
    "metric": str,
    "before_redistribution": dict[str, float | None],
    "after_redistribution": dict[str, float | None],
}
MOST_ROUNDS = 10**9
HEALTH = ("loss", "seconds", "clients_per_second", "bytes_", "aggregation_error", "angle_", "update_", "personal_drift")
"""What the names of a line's numbers begin with that are drawn or summed."""

EXAMPLE: dict[str, Any] = {
    "client": str,
    "picture": str,
    "question": str,
    "answer": str,
    "answers": dict[str, dict[str, Any]],
}
ANSWER: dict[str, Any] = {"text": str, "exact_match": float, "token_f1": float}

COMPARISON: dict[str, Any] = {
    "methods": list[str],
    "seeds": list[int],
    "runs": list[dict[str, Any]],
    "zero_shot": list[dict[str, Any]],
}
MORE_OF_COMPARISON: dict[str, Any] = {"command": str, "settings": dict[str, Any] | None, "selected_by": str}
ENTRY: dict[str, Any] = {"seed": int}
MORE_OF_ENTRY: dict[str, Any] = {"test": dict[str, Scores] | None, "validation": dict[str, Scores] | None}
RUN_ENTRY: dict[str, Any] = {
    **ENTRY,
    "method": str,
    "folder": str,
    "seconds": float,
    "bytes_up_per_client": float,
}
MORE_OF_RUN_ENTRY: dict[str, Any] = {
    **MORE_OF_ENTRY,
    "global": BySplit | None,
    "selected_round": int | None,
    "bytes_down_per_client": float,
}


@dataclass(frozen=True)
class StoredConfig:
    """What `config.json` says of a run.

    Attributes:
        content: the whole file.
        run: the options.
        wave: clients side by side.
        mesh: the devices that the run had.
        clients: everybody's name.
    """

    content: dict[str, Any]
    run: Run
    wave: int
    mesh: MeshShape
    clients: tuple[str, ...]


MOST_BYTES = 1 << 30
"""No text file of a run is longer; a hole of any size takes a disk nothing and memory all of it."""


def parse_json(path: Path, text: str, where: str = "") -> dict[str, Any]:
    """Read a text as one JSON object.

    Raises:
        UserError: it is none; `where` in the file tells.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: a million brackets
        said = str(error) or type(error).__name__
        raise UserError(f"{path}{where}: not readable as JSON ({said})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}{where}: expected a JSON object, found {str(stored)[:40]!r}")
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return parse_json(path, read_text(path))


def read_text(path: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        UserError: it cannot be read, has more than `MOST_BYTES`, or is no UTF-8.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
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
    stored = read_json(path)
    _check(path, stored, {"run": dict[str, Any], "resolved": dict[str, Any]}, {})
    resolved = stored["resolved"]
    _check(path, resolved, {"wave": int, "clients": list[str], "mesh": dict[str, int]}, {}, "resolved.")
    mesh = resolved["mesh"]
    if not {"clients"} <= set(mesh) <= {"clients", "model"} or min(mesh.values()) < 1 or resolved["wave"] < 1:
        raise UserError(f"{path}: resolved has no mesh or wave that could be; was it written by another version?")
    try:
        run = from_json(stored["run"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return StoredConfig(stored, run, resolved["wave"], MeshShape(**mesh), tuple(resolved["clients"]))


def seal(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` with a digest of all the rest, which tells whether somebody edited it."""
    return {**config, SEAL: _digest(config)}


def check_seal(path: Path, stored: Mapping[str, Any]) -> None:
    """See that `config.json` is as it was written, and has what is compared with data and model now.

    Raises:
        UserError: it is not, or is of version 0.1.
    """
    if SEAL not in stored:
        raise UserError(f"{path} has no digest: it is of version 0.1, whose runs neither go on nor are evaluated")
    if stored[SEAL] != _digest(stored):
        raise UserError(
            f"{path} is not as the run wrote it: was it edited, or damaged? What a run was made of cannot change; put "
            "the file back, or start a new run with these options"
        )
    _check(path, stored, {"fingerprint": dict[str, Any], "versions": dict[str, str | None]}, {})
    _check(path, stored["fingerprint"], FINGERPRINT, {}, "fingerprint.")


def _digest(config: Mapping[str, Any]) -> str:
    sealed = {name: value for name, value in config.items() if name != SEAL}
    return digest_parts([json.dumps(sealed, sort_keys=True).encode()]).hex()


def check_origin(path: Path, stored: Mapping[str, Any]) -> None:
    """See that `config.json`, perhaps of another version, has the form that tables and reports count on.

    Raises:
        UserError: the first entry that has another.
    """
    _check(path, stored, {"run": dict[str, Any]}, {"resolved": dict[str, Any], "versions": dict[str, Any]})
    _check(path, stored["run"], {"method": str}, {"train": dict[str, Any], "evaluation": dict[str, Any]}, "run.")
    _check(path, stored["run"].get("train", {}), {}, {"finetune_steps": int}, "run.train.")
    _check(path, stored["run"].get("evaluation", {}), {}, {"neighbours": int}, "run.evaluation.")


def check_results(path: Path, stored: Mapping[str, Any]) -> None:
    """See that `results.json` has the form that tables and pictures count on.

    Raises:
        UserError: the first entry that has another.
    """
    _check(path, stored, RESULTS, MORE_RESULTS)
    if stored.get("held_out") is not None:
        _check(path, {"held_out": stored["held_out"]}, {"held_out": dict[str, Any]}, {})
        _check(path, stored["held_out"], HELD_OUT, {}, "held_out.")
    if stored.get("cross_clients") is not None:
        _check_matrix(path, stored["cross_clients"])


def _check_matrix(path: Path, stored: object) -> None:
    whole = {"cross_clients": stored}
    _check(path, whole, {"cross_clients": dict[str, list[str] | list[list[float]]]}, {})
    assert isinstance(stored, Mapping)
    _check(path, stored, {"clients": list[str]}, {}, "cross_clients.")
    count = len(stored["clients"])
    for metric in stored.keys() - {"clients"}:
        rows = stored[metric]
        if len(rows) != count or any(not isinstance(row, list) or len(row) != count for row in rows):
            raise UserError(f"{path}: cross_clients.{metric} is no table of {count} by {count} numbers; is it damaged?")


def check_line(path: Path, where: str, line: Mapping[str, Any]) -> None:
    """See that a line of `metrics.jsonl` has the form that pictures and a resumed run count on.

    Raises:
        UserError: the first entry that has another.
    """
    numbers = {name: float | None for name in line if name.startswith(HEALTH)}
    _check(path, line, LINE, {**MORE_OF_LINE, **numbers}, before=where)
    if not 1 <= line["round"] <= MOST_ROUNDS:
        raise UserError(f"{path}{where}: there is no round {line['round']!s:.20}; is the file damaged?")
    validation = line.get("validation") or {}
    _check(
        path, validation, {}, {name: VALIDATION.get(name, float | None) for name in validation}, "validation.", where
    )


def check_comparison(path: Path, stored: Mapping[str, Any]) -> None:
    """See that `comparison.json` has the form that tables and pictures count on.

    Raises:
        UserError: the first entry that has another.
    """
    _check(path, stored, COMPARISON, MORE_OF_COMPARISON)
    for number, entry in enumerate(stored["zero_shot"]):
        _check(path, entry, ENTRY, MORE_OF_ENTRY, f"zero_shot.{number}.")
    for number, entry in enumerate(stored["runs"]):
        _check(path, entry, RUN_ENTRY, MORE_OF_RUN_ENTRY, f"runs.{number}.")


def check_examples(path: Path, stored: Mapping[str, Any]) -> None:
    """See that `examples.json` has the form that a report counts on.

    Raises:
        UserError: the first entry that has another.
    """
    _check(path, stored, {"examples": list[dict[str, Any]], "looked_at": dict[str, int]}, {})
    for number, entry in enumerate(stored["examples"]):
        _check(path, entry, EXAMPLE, {}, f"examples.{number}.")
        for model, answer in entry["answers"].items():
            _check(path, answer, ANSWER, {}, f"examples.{number}.answers.{model}.")


def _check(
    path: Path,
    stored: Mapping[str, Any],
    needed: Mapping[str, Any],
    more: Mapping[str, Any],
    prefix: str = "",
    before: str = "",
) -> None:
    """See that entries are there, and of their types."""
    for name, hint in {**needed, **more}.items():
        if name in stored:
            try:
                fit(hint, stored[name], prefix + name)
            except UserError as error:
                raise UserError(f"{path}{before}: {error}; is the file damaged?") from None
        elif name in needed:
            raise UserError(
                f"{path}{before}: the entry {prefix + name!r} is missing; is it damaged, or of another version?"
            )
