"""Files of a model's folder: its JSON, and the files that hold its weights, safetensors or PyTorch's pickles.

Where a file cannot be read, the message says what it is in truth.
"""

import json
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.models.pickled_tensors import PickleError, open_pickle

_PICKLE, _PICKLES = "it is a PyTorch pickle under another name", (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")
# Beginnings of files, and what they show.
_KNOWN = (
    ((b"version https://git-lfs",), "it is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`"),
    (_PICKLES, _PICKLE),
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
        if head.startswith(beginnings) and not (file.suffix == ".bin" and kind == _PICKLE):
            return kind
    if file.suffix == ".bin" and head.startswith(_PICKLES[1:]):
        return "PyTorch before 1.6 wrote it: load it there and save it again"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a failed download leaves: download it again"
    if file.suffix == ".safetensors":
        if len(head) < 8 or not any(head):
            return "it holds no header"
        # The format begins with the length of its header, in 8 bytes.
        size, needed = file.stat().st_size, struct.unpack("<Q", head[:8])[0] + 8
        if needed > size:
            return f"it is cut short: {size} bytes, and its header alone needs {needed}"
    return str(error) if isinstance(error, PickleError) else explain_error(error)


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
    """Open a file of weights for `keys()`, `get_slice(name)` and `get_tensor(name)`: safetensors, or a pickle (`.bin`).

    What is none, or is damaged, is refused, also where that shows only inside of the block. Nothing that a pickle asks
    for is run (see `pickled_tensors`).
    """
    import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers bfloat16 with numpy
    from safetensors import SafetensorError, safe_open

    if file.suffix == ".bin":
        try:
            with open_pickle(file) as opened:
                yield opened
        except PickleError as error:
            raise UserError(f"{file} cannot be read as PyTorch's weights: {_sniff(file, error)}") from None
        return
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file: {_sniff(file, error)}") from None


def encode_tensors(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Write arrays as the bytes of a safetensors file: equal arrays and metadata are equal bytes.

    >>> import numpy as np
    >>> encode_tensors({"a": np.zeros(2, np.float32)}, {"part": "base"})[8:40]
    b'{"__metadata__":{"part":"base"},'
    """
    import numpy as np
    from safetensors.numpy import save

    # Not `ascontiguousarray`, which makes a list of one number of a number.
    content = save({name: np.asarray(leaf, order="C") for name, leaf in arrays.items()}, dict(metadata))
    # The library's order of the metadata is another in every process.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def find_files(folder: Path) -> list[Path]:
    """Find the files of a folder's weights: model.safetensors or those that its index names, or else PyTorch's pickles.

    Raises:
        UserError: where none is there, the index is damaged, or a file that it names is missing.
    """
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = single.with_name(f"{single.name}.index.json")
        if single.is_file():
            return [single]
        if index.is_file():
            return _read_index(index)
    message = f"{folder} has neither model.safetensors nor model.safetensors.index.json"
    others = sorted(file.name for kind in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(kind))
    raise UserError(f"{message}; of {', '.join(others[:5])} none is called so" if others else message)


def _read_index(index: Path) -> list[Path]:
    """Read which files an index names: all beside it."""
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names:
        raise UserError(f"{index} has no weight_map that names files: is it cut short?")
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]!r}, which is no file beside it")
    files = [index.parent / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(absent)}")
    return files
