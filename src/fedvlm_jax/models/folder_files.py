"""Files of a model's folder: what they are in truth, told in a few words where they are not what their names say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError, explain_error

__all__ = ["explain_error", "read_json", "sniff"]


def sniff(file: Path) -> str:
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
        known = sniff(file) if file.exists() else ""
        raise UserError(f"{file} cannot be read as JSON: {known or explain_error(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {_name(found)}, expected an object {{…}}")
    return found


def _name(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")
