"""What was found out about a table's images, kept beside the table, so that the next run starts at once."""

import contextlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["ImageFacts"]

SIZE = 16
"""Bytes of a digest."""


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
        """Take up what an earlier run found out; nothing where the file is not there or not whole."""
        facts = cls(file)
        damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
        with contextlib.suppress(*damaged), file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            rows, digests, sound = stored["rows"].tolist(), stored["digests"], stored["sound"].tolist()
            facts.digests = dict(zip(rows, (digest.tobytes() for digest in digests), strict=True))
            facts.sound = set(sound)
        return facts

    def save(self, lasting: Callable[[int], bool]) -> None:
        """Keep what holds of the rows that are `lasting`: others' images are files of their own, which may change."""
        if self.file is None:
            return
        rows = [row for row in self.digests if lasting(row)]
        digests = np.frombuffer(b"".join(self.digests[row] for row in rows), np.uint8).reshape(-1, SIZE)
        sound = np.asarray(sorted(row for row in self.sound if lasting(row)), np.int64)
        scratch = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            with scratch.open("wb") as opened:
                np.savez(opened, rows=np.asarray(rows, np.int64), digests=digests, sound=sound)
            scratch.replace(self.file)
