"""The files of a PEFT folder, read as a stranger's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.folder_files import open_tensors, read_json
from fedvlm_jax.models.weight_table import FLOATS
from fedvlm_jax.peft.patterns import show

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_TIMES, _ROOM = 4, 2**20  # a file of tensors is at most so many times as large as the model, and so many bytes


def read_tensors(folder: Path, size: int) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Read the tensors of a PEFT folder, and what their file says of itself.

    Args:
        folder: of PEFT's.
        size: bytes of the model, in float32: a file that is larger than any adapter of it is not read.

    Raises:
        UserError: there is no such file, it is damaged, too large, or holds other than floating-point numbers.
    """
    file = folder / TENSORS
    file = file if file.is_file() else folder / PICKLE
    if not file.is_file():
        raise UserError(f"{folder} has no {TENSORS}")
    most = _TIMES * size + _ROOM
    if (there := file.stat().st_size) > most:
        raise UserError(
            f"{file} has {there:,} bytes, and an adapter of this model at most {most:,}: is it a whole model?"
        )
    with open_tensors(file) as opened:
        names = list(opened.keys())
        for name in names:
            if (kind := opened.get_slice(name).get_dtype()) not in FLOATS:
                raise UserError(f"{file}: {show(name)} is of type {kind}, expected one of {', '.join(FLOATS)}")
        about: Mapping[str, str] | None = opened.metadata() if file.name == TENSORS else None
        return {name: opened.get_tensor(name) for name in names}, about or {}


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}, so it is no PEFT folder{_suggest(folder)}")
    return read_json(folder / CONFIG)


def _suggest(folder: Path) -> str:
    """Say what to name instead of an export, or of a run."""
    below = (inner.parent for depth in ("*", "*/*") for inner in sorted(folder.glob(f"{depth}/{CONFIG}")))
    if (inner := next(below, None)) is not None:
        return f": name one of those in it, such as {inner}"
    is_run = (folder / "config.json").is_file() and (folder / "adapters").is_dir()
    return f": it is a run's, of which `fedvlm export {folder}` makes such folders" if is_run else ""
