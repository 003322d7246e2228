"""The Arrow files that `datasets` keeps, opened without their images ever counting as memory.

A page of a mapped file that was touched is the process's until the system wants it back, so that one epoch over 14 GB
would show as 14 GB. Text is small and read through the mapping. Images are read from the file, at the places where the
mapping says that they lie: nothing stays behind, and threads wait for the disk without the interpreter's lock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Blobs", "open_arrow"]


@dataclass(frozen=True, eq=False)
class Blobs:
    """Where every row's bytes lie.

    Attributes:
        files: the Arrow files.
        file: [N] each row's file.
        start: [N] where in it the bytes begin; 0 where a row has none.
        length: [N] how many there are; 0 where a row has none.
    """

    files: tuple[Path, ...]
    file: Int[np.ndarray, " rows"]
    start: Int[np.ndarray, " rows"]
    length: Int[np.ndarray, " rows"]

    def read(self, row: int) -> bytes:
        """The bytes of a row."""
        if self.length[row] == 0:
            return b""
        with self.files[self.file[row]].open("rb", buffering=0) as file:
            file.seek(int(self.start[row]))
            return file.read(int(self.length[row]))


def open_arrow(files: Sequence[Path]) -> tuple["pa.Table", Blobs]:
    """Map Arrow files one after the other, and find the bytes in their column `image`, a struct of bytes and path."""
    import pyarrow as pa

    tables, owners, starts, lengths = [], [], [], []
    for number, file in enumerate(files):
        mapped = pa.memory_map(str(file)).read_buffer()
        table = pa.ipc.open_stream(mapped).read_all()
        tables.append(table)
        for chunk in table.column("image").chunks:
            start, length = _locate(chunk)
            # Nothing has no place: one that depends on this mapping's address would fit no seal of another mapping.
            start = np.where(length > 0, start - mapped.address, 0)
            assert ((length == 0) | ((start >= 0) & (start + length <= mapped.size))).all(), "not mapped but copied"
            owners.append(np.full(len(chunk), number))
            starts.append(start)
            lengths.append(length)
    blobs = Blobs(tuple(files), *(np.concatenate(parts).astype(np.int64) for parts in (owners, starts, lengths)))
    return pa.concat_tables(tables), blobs


def _locate(chunk: "pa.StructArray") -> tuple[np.ndarray, np.ndarray]:
    """Addresses and lengths of a chunk's bytes."""
    values = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))["bytes"]
    _, offsets, content = values.buffers()
    if content is None:  # no row has any
        return np.zeros(len(values)), np.zeros(len(values))
    edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    return content.address + edges[:-1], np.where(valid, np.diff(edges), 0)
