"""Arrow files that `datasets` keeps, opened without their images ever counting as memory, and sealed against damage.

A page of a mapped file that was touched is the process's until the system wants it back, so that an epoch over 14 GB
would show as 14 GB. Text is small and read through the mapping. Images are read from the file, at the places where the
mapping says that they lie: nothing stays behind, and threads wait for the disk without the interpreter's lock.
"""

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import ARROW, list_entries, remove
from fedvlm_jax.utils.digests import digest_parts
from fedvlm_jax.utils.files import read_plain, write_bytes

SEAL = "fedvlm-jax-seal.txt"


@dataclass(frozen=True, eq=False)
class ImageLocations:
    """Places of every row's encoded image: its file's number [N], the bytes' start [N] and count [N] (0: none)."""

    files: tuple[Path, ...]
    file: Int[np.ndarray, " rows"]
    start: Int[np.ndarray, " rows"]
    length: Int[np.ndarray, " rows"]

    def read(self, row: int) -> bytes:
        """Read the bytes of a row."""
        if self.length[row] == 0:
            return b""
        with self.files[self.file[row]].open("rb", buffering=0) as file:
            file.seek(int(self.start[row]))
            return file.read(int(self.length[row]))


def open_arrow(files: Sequence[Path]) -> tuple[pa.Table, ImageLocations]:
    """Map Arrow files one after the other, and find the bytes in their column `image`, a struct of bytes and path."""
    tables, owners, starts, lengths = [], [], [], []
    for number, file in enumerate(files):
        mapped = pa.memory_map(str(file)).read_buffer()
        table = pa.ipc.open_stream(mapped).read_all()
        tables.append(table)
        for chunk in table.column("image").chunks:
            start, length = _locate(chunk)
            # An empty cell has no place: the address of this mapping would fit no seal of another mapping.
            start = np.where(length > 0, start - mapped.address, 0)
            assert ((length == 0) | ((start >= 0) & (start + length <= mapped.size))).all(), "not mapped but copied"
            owners.append(np.full(len(chunk), number))
            starts.append(start)
            lengths.append(length)
    places = (np.concatenate(parts).astype(np.int64) for parts in (owners, starts, lengths))
    return pa.concat_tables(tables), ImageLocations(tuple(files), *places)


def _locate(chunk: pa.StructArray) -> tuple[np.ndarray, np.ndarray]:
    """Find addresses and lengths of a chunk's bytes."""
    values = chunk.flatten()[chunk.type.get_field_index("bytes")]
    _, offsets, content = values.buffers()
    if content is None:  # no row has any
        return np.zeros(len(values)), np.zeros(len(values))
    edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    return content.address + edges[:-1], np.where(valid, np.diff(edges), 0)


def check_seal(data: pa.Table, images: ImageLocations) -> bool:
    """Compare a table with the seal beside its files, or seal it where it was just written.

    A seal is a digest of everything but the encoded images: columns, texts, numbers, and where the images lie. Each
    image is compared with its digest when it is decoded (`unique_images.py`).
    """
    parts = [np.frombuffer(data.schema.serialize(), np.uint8), images.file, images.start, images.length]
    for name in data.column_names:
        for chunk in data.column(name).chunks:
            sealed = chunk.flatten()[chunk.type.get_field_index("path")] if name == "image" else chunk
            parts += [np.frombuffer(buffer, np.uint8) for buffer in sealed.buffers() if buffer is not None]
    found = digest_parts(parts, len(data), *(file.stat().st_size for file in images.files)).hex()
    file = images.files[0].parent / SEAL
    if file.exists():
        return read_plain(file) == found.encode()
    with contextlib.suppress(OSError):  # without a seal it is as good as one just written
        write_bytes(file, found.encode())
    return True


def discard(folder: Path) -> None:
    """Remove the table below a folder of the cache, whose seal it does not fit or which cannot be read.

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
