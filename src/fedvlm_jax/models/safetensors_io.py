"""The safetensors files of a checkpoint folder: which they are, what their headers say, and their tensors."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.folder_files import explain_error, read_json, sniff

__all__ = ["Tensor", "advise_conversion", "find_files", "list_tensors", "read_tensors"]


class Tensor(NamedTuple):
    """A line of a file's header; `kind` in the format's own words, "F32"."""

    name: str
    shape: tuple[int, ...]
    kind: str


@contextmanager
def _opened(file: Path) -> Generator[Any]:
    """A safetensors file.

    Raises:
        UserError: where it is none, or is damaged.
    """
    import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers bfloat16 with numpy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        known = sniff(file) if file.exists() else ""
        raise UserError(f"{file} is no whole safetensors file: {known or explain_error(error)}") from None


def list_tensors(file: Path) -> list[Tensor]:
    """The header of a safetensors file; no tensor is read.

    Raises:
        UserError: where it is none, or is damaged.
    """
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
        return [Tensor(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a safetensors file, one at a time.

    Raises:
        UserError: as `list_tensors`.
    """
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118  not a dict
            yield name, opened.get_tensor(name)


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those of the index where there is one, else model.safetensors.

    Raises:
        UserError: where neither is there, the index is damaged, or a file that it names is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(_explain_absence(folder, single, index))
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names:
        raise UserError(f"{index} has no weight_map that names files: is it cut short?")
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]!r}, which is no file beside it")
    files = [folder / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(absent)}")
    return files


def advise_conversion(source: str, folder: str) -> str:
    """Say how pickled weights, of a folder or a hub id, become safetensors in a folder."""
    return (
        'convert them, where PyTorch is installed: python -c "from transformers import '
        f"Florence2ForConditionalGeneration as F; F.from_pretrained('{source}').save_pretrained('{folder}')\""
    )


def _explain_absence(folder: Path, single: Path, index: Path) -> str:
    said = f"{folder} has neither {single.name} nor {index.name}"
    if any(folder.glob("pytorch_model*.bin")):
        return f"{said}, only PyTorch's pickled weights; {advise_conversion(str(folder), str(folder))}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    return said + (f"; of {', '.join(others[:5])} none is called so" if others else "")
