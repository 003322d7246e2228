"""Seals of Arrow files in our cache: what was damaged after it was written is noticed when a table is opened.

A seal is a digest of everything but the encoded images: columns, texts, numbers, and where the images lie. Those are a
small part of the files, and are read anyway. Each image is compared with its own digest when it is decoded
(`images.py`). That digest is taken when a run first asks for the row, not when the row is written, so what a disk does
to an image before then is not noticed by it, only by the decoder.
"""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedvlm_jax.data.arrow_images import Blobs
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import ARROW, list_entries, remove
from fedvlm_jax.utils.digests import digest_parts
from fedvlm_jax.utils.files import read_plain, write_bytes

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["check_seal", "discard"]

SEAL = "fedvlm-jax-seal.txt"


def check_seal(data: "pa.Table", blobs: Blobs) -> bool:
    """Compare a table with the seal beside its files, or seal it where it was just written."""
    found = digest_parts(_list_parts(data, blobs), len(data), *(file.stat().st_size for file in blobs.files)).hex()
    file = blobs.files[0].parent / SEAL
    if file.exists():
        return read_plain(file) == found.encode()
    with contextlib.suppress(OSError):  # without a seal it is as good as one just written
        write_bytes(file, found.encode())
    return True


def _list_parts(data: "pa.Table", blobs: Blobs) -> Iterator[np.ndarray]:
    yield np.frombuffer(data.schema.serialize(), np.uint8)
    yield from (blobs.file, blobs.start, blobs.length)
    for name in data.column_names:
        for chunk in data.column(name).chunks:
            if name == "image":
                parts = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))
                chunk = parts["path"]
            yield from (np.frombuffer(buffer, np.uint8) for buffer in chunk.buffers() if buffer is not None)


def discard(folder: Path) -> None:
    """Remove the table below a folder of our cache, whose seal it does not fit or which cannot be read.

    Raises:
        UserError: another process uses one.
    """
    gc.collect()  # tables that nobody reads any more would hold their files
    for entry in list_entries([ARROW]):
        if folder in (entry.path, *entry.path.parents) and not remove(entry):
            raise UserError(
                f"{entry.path} is damaged, and a running process uses it: end that, or set FEDVLM_CACHE to another "
                "folder"
            )
