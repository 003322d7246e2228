"""Files of a model's folder: its JSON, and the safetensors files that hold its weights.

Where a file cannot be read, the message says what it is in truth.
"""

import json
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError, explain_error

# Beginnings of files, and what they show.
_KNOWN = (
    ((b"version https://git-lfs",), "it is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`"),
    ((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"), "it is a PyTorch pickle under another name"),
    ((b"GGUF",), "it is a GGUF file"),
    ((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"), "it begins with a byte order mark: save it as plain UTF-8"),
)


def _sniff(file: Path, error: Exception) -> str:
    """Say what a file that cannot be read is instead, or where nothing is known of it, what the reader says."""
    if not file.exists():
        return explain_error(error)
    if file.is_dir():
        return "it is a folder"
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        return "it is empty"
    for beginnings, kind in _KNOWN:
        if head.startswith(beginnings):
            return kind
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a failed download leaves: download it again"
    if file.suffix == ".safetensors":
        if len(head) < 8 or not any(head):
            return "it holds no header"
        # The format begins with the length of its header, in 8 bytes.
        size, needed = file.stat().st_size, struct.unpack("<Q", head[:8])[0] + 8
        if needed > size:
            return f"it is cut short: {size} bytes, and its header alone needs {needed}"
    return explain_error(error)


def read_json(file: Path) -> dict[str, Any]:
    """Read the object that a JSON file holds; refuse one that cannot be read, is no JSON, or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {_sniff(file, error)}") from None
    if not isinstance(found, dict):
        names = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}
        raise UserError(f"{file} holds {names.get(type(found), 'a number')}, expected an object {{…}}")
    return found


def require_integer(name: str, value: Any, least: int, most: int) -> None:
    """Refuse a value of a file that is no whole number, or one out of its bounds.

    >>> require_integer("num_beams", 3, 1, 64)
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} is {value!r}, expected a whole number from {least} to {most}")


@contextmanager
def open_tensors(file: Path) -> Generator[Any]:
    """Open a safetensors file for `keys()`, `get_slice(name)` and `get_tensor(name)`.

    What is none, or is damaged, is refused, also where that shows only inside of the block.
    """
    import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers bfloat16 with numpy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file: {_sniff(file, error)}") from None


def find_files(folder: Path) -> list[Path]:
    """Find the safetensors files of a checkpoint folder: model.safetensors, or else those that the index names.

    Refused are a folder with neither, a damaged index, and one that names a missing file.

    Raises:
        UserError: where neither is there, the index is damaged, or a file that it names is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        message = f"{folder} has neither {single.name} nor {index.name}"
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        if any(folder.glob("pytorch_model*.bin")):
            message += f", only PyTorch's pickled weights; {advise_conversion(str(folder), str(folder))}"
        elif others:
            message += f"; of {', '.join(others[:5])} none is called so"
        raise UserError(message)
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
