"""Records of rows of one size by key, in a folder that any number of processes read and write at once.

Each process that adds records writes a segment, two files that no other process ever writes: `ID.rows` has the rows of
its records one after the other, `ID.keys` for each record its key, its first row and their number, and a digest of key
and record, written after them. So no process can overwrite what another relies on, on network file systems too, and a
kill leaves at most a tail without a whole entry. A record that does not fit its digest counts as missing: it is
computed again and added again.
"""

import contextlib
import hashlib
import itertools
import logging
import struct
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedvlm_jax.utils.cache_folders import Hold
from fedvlm_jax.utils.digests import DIGEST_SIZE

KEY = 16
"""Bytes of a key."""

ROWS = struct.Struct("<QQ")
"""A record's first row in its segment, and how many there are."""

ENTRY = KEY + ROWS.size + DIGEST_SIZE

MOST_ROWS = 2**40
"""More are in no segment: a larger number is a damaged one, which a file cannot be asked for."""


class _Place(NamedTuple):
    segment: str
    start: int
    rows: int
    digest: bytes


class Records:
    """Records in a folder, by keys of `KEY` bytes. Threads must take turns; processes need not."""

    def __init__(self, folder: Path, size: int) -> None:
        """Open the folder, which is made where it does not exist, and hold it as in use.

        Args:
            size: bytes of a row.

        Raises:
            OSError: it cannot be made.
        """
        self._folder, self._size = folder, size
        self._hold = Hold(folder)
        self._places: dict[bytes, list[_Place]] = {}
        self._seen: dict[str, int] = {}
        self._segment = uuid.uuid4().hex
        self._written = 0  # rows of this segment
        self._writable = True
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def count_bytes(self) -> int:
        """Count the bytes of all rows in the folder, twice where two processes added a record at the same time."""
        total = 0
        for file in self._folder.glob("*.rows"):
            with contextlib.suppress(OSError):
                total += file.stat().st_size
        return total

    def refresh(self) -> None:
        """Take up what other processes have added since the last call."""
        for file in sorted(self._folder.glob("*.keys")):
            first = self._seen.get(file.stem, 0)
            if not (file.is_file() and file.with_suffix(".rows").is_file()):
                continue  # a pipe would be waited for, and a device never ends
            try:
                with file.open("rb") as opened:
                    opened.seek(first * ENTRY)
                    content = opened.read()
            except OSError:
                continue
            whole = len(content) // ENTRY  # the last entry may be in the middle of being written
            for number in range(whole):
                entry = content[number * ENTRY : (number + 1) * ENTRY]
                start, rows = ROWS.unpack_from(entry, KEY)
                place = _Place(file.stem, start, rows, entry[KEY + ROWS.size :])
                self._places.setdefault(entry[:KEY], []).append(place)
            self._seen[file.stem] = first + whole

    def read(self, key: bytes, rows: int = 1) -> bytes | None:
        """Read the record of a key, which has so many rows; None where none is whole: the key no longer counts then."""
        for place in list(self._places.get(key, ())):
            content = b""
            if place.rows == rows and place.start < MOST_ROWS:
                content = self._read(place)
            if len(content) == rows * self._size and _digest(key, content) == place.digest:
                return content
            self._places[key].remove(place)
        self._places.pop(key, None)
        return None

    def _read(self, place: _Place) -> bytes:
        with contextlib.suppress(OSError), (self._folder / f"{place.segment}.rows").open("rb", buffering=0) as file:
            file.seek(place.start * self._size)
            return file.read(place.rows * self._size)
        return b""

    def add(self, keys: Sequence[bytes], records: Iterable[bytes]) -> None:
        """Add records of whole rows; where the disk does not take them, warn once and go on without."""
        if not (keys and self._writable):  # no files of nothing, each of which every reader would open
            return
        contents = list(records)
        counts = [len(content) // self._size for content in contents]
        starts = [*itertools.accumulate(counts, initial=self._written)][:-1]
        places = [
            _Place(self._segment, start, count, _digest(key, content))
            for key, content, start, count in zip(keys, contents, starts, counts, strict=True)
        ]
        try:
            # Keys last: an entry then never stands for a record that a kill cut short.
            entries = [
                key + ROWS.pack(place.start, place.rows) + place.digest for key, place in zip(keys, places, strict=True)
            ]
            for kind, written in (("rows", contents), ("keys", entries)):
                with (self._folder / f"{self._segment}.{kind}").open("ab") as file:
                    file.write(b"".join(written))
        except OSError as error:
            self._writable = False
            logging.getLogger(__name__).warning("%s takes no more: %s", self._folder, error.strerror or error)
            return
        for key, place in zip(keys, places, strict=True):
            self._places.setdefault(key, []).append(place)
        self._seen[self._segment] = self._seen.get(self._segment, 0) + len(contents)
        self._written += sum(counts)


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE, key=key).digest()
