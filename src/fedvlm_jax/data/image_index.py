"""Digests and soundness of a table's images, kept beside the table, so that the next run starts at once."""

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedvlm_jax.utils.files import read_plain, write_bytes

SIZE = 16  # bytes of a digest


@dataclass(eq=False)
class ImageFacts:
    """Digests and soundness of images, by row.

    Attributes:
        file: where they are kept; in memory only where None.
        digests: row -> digest of its encoded image.
        sound: rows whose image was decoded without a fault.
    """

    file: Path | None = None
    digests: dict[int, bytes] = field(default_factory=dict, repr=False)
    sound: set[int] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, file: Path) -> "ImageFacts":
        """Read what an earlier run kept; nothing where the file is missing or damaged."""
        digests, sound = _read(file)
        return cls(file, digests, sound)

    def save(self, lasting: Callable[[int], bool]) -> None:
        """Keep facts of the rows that are `lasting`: other images are separate files, which may change.

        Facts that another process has kept in the meantime stay.
        """
        if self.file is None:
            return
        digests, sound = _read(self.file)  # again: another process may have written since
        digests |= {row: digest for row, digest in self.digests.items() if lasting(row)}
        sound |= {row for row in self.sound if lasting(row)}
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_bytes(self.file, _pack(digests, sound))


def _pack(digests: dict[int, bytes], sound: set[int]) -> bytes:
    """Pack the arrays, after a digest of them."""
    out = io.BytesIO()
    rows = np.asarray(list(digests), np.int64)
    stacked = np.frombuffer(b"".join(digests.values()), np.uint8).reshape(-1, SIZE)
    np.savez(out, rows=rows, digests=stacked, sound=np.asarray(sorted(sound), np.int64))
    return _digest(out.getvalue()) + out.getvalue()


def _read(file: Path) -> tuple[dict[int, bytes], set[int]]:
    content = b""
    with contextlib.suppress(OSError):
        content = read_plain(file)
    if len(content) <= SIZE or _digest(content[SIZE:]) != content[:SIZE]:
        return {}, set()
    with np.load(io.BytesIO(content[SIZE:]), allow_pickle=False) as stored:
        digests = (digest.tobytes() for digest in stored["digests"])
        return dict(zip(stored["rows"].tolist(), digests, strict=True)), set(stored["sound"].tolist())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=SIZE, person=b"image facts").digest()
