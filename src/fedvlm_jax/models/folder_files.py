"""Files of a model's folder: its JSON, and the safetensors files that hold its weights.

A file that cannot be read is told by what it is in truth.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedvlm_jax.errors import UserError, explain_error


def _sniff(file: Path) -> str:
    """Say what a file that cannot be read is instead; empty where nothing is known of it."""
    if file.is_dir():
        return "it is a folder"
    with file.open("rb") as opened:
        head = opened.read(512)
    size, text = file.stat().st_size, head.lstrip().lower()
    if not size:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a failed download leaves: download it again"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a PyTorch pickle under another name"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file"
    if head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it begins with a byte order mark: save it as plain UTF-8"
    return _measure(file.suffix, head, size)


def _measure(suffix: str, head: bytes, size: int) -> str:
    """Say whether a safetensors file is shorter than its own header."""
    if suffix != ".safetensors":
        return ""
    if len(head) < 8 or not any(head):
        return "it holds no header"
    length = struct.unpack("<Q", head[:8])[0]
    return f"it is cut short: {size} bytes, and its header alone needs {length + 8}" if length + 8 > size else ""


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: where it cannot be read, is no JSON, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        known = _sniff(file) if file.exists() else ""
        raise UserError(f"{file} cannot be read as JSON: {known or explain_error(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {_name(found)}, expected an object {{…}}")
    return found


def _name(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")


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
        known = _sniff(file) if file.exists() else ""
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
        f"AutoModelForImageTextToText as F; F.from_pretrained('{source}').save_pretrained('{folder}')\""
    )


def _explain_absence(folder: Path, single: Path, index: Path) -> str:
    said = f"{folder} has neither {single.name} nor {index.name}"
    if any(folder.glob("pytorch_model*.bin")):
        return f"{said}, only PyTorch's pickled weights; {advise_conversion(str(folder), str(folder))}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    return said + (f"; of {', '.join(others[:5])} none is called so" if others else "")
