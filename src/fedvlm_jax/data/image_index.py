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
    """Digest of each row's encoded image, and the rows whose image was decoded without a fault.

    `file` keeps them; where it is None they are in memory only.
    """

    file: Path | None = None
    digests: dict[int, bytes] = field(default_factory=dict, repr=False)
    sound: set[int] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, file: Path) -> "ImageFacts":
        """Read what an earlier run kept; nothing where the file is missing or damaged."""
        return cls(file, *_read(file))

    def save(self, lasting: Callable[[int], bool]) -> None:
        """Keep facts of the rows that are `lasting`: other images are separate files, which may change."""
        if self.file is None:
            return
        digests, sound = _read(self.file)  # again: what another process has written since stays
        digests |= {row: digest for row, digest in self.digests.items() if lasting(row)}
        sound |= {row for row in self.sound if lasting(row)}
        out = io.BytesIO()
        rows = np.asarray(list(digests), np.int64)
        stacked = np.frombuffer(b"".join(digests.values()), np.uint8).reshape(-1, SIZE)
        np.savez(out, rows=rows, digests=stacked, sound=np.asarray(sorted(sound), np.int64))
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_bytes(self.file, _digest(out.getvalue()) + out.getvalue())


def _read(file: Path) -> tuple[dict[int, bytes], set[int]]:
    content = b""
    with contextlib.suppress(OSError):
        content = read_plain(file)
    # The arrays come after a digest of them, which a file that was cut short or changed does not fit.
    if len(content) <= SIZE or _digest(content[SIZE:]) != content[:SIZE]:
        return {}, set()
    with np.load(io.BytesIO(content[SIZE:]), allow_pickle=False) as stored:
        digests = (digest.tobytes() for digest in stored["digests"])
        return dict(zip(stored["rows"].tolist(), digests, strict=True)), set(stored["sound"].tolist())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=SIZE, person=b"image facts").digest()
