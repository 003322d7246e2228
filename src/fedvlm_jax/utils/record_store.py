"""Records of one size by key, in a folder that any number of processes read and write at once.

Each process that adds records writes a segment, two files that no other process ever writes: `ID.rows` has the records
one after the other, `ID.keys` for each its key and a digest of key and record, written after it. So no process can
overwrite what another relies on, on network file systems too, and a kill leaves at most a tail without a whole entry. A
record that does not fit its digest counts as missing: it is computed again and added again.
"""

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedvlm_jax.utils.cache_folders import Hold
from fedvlm_jax.utils.digests import DIGEST_SIZE

KEY = 16
"""Bytes of a key."""

ENTRY = KEY + DIGEST_SIZE


class _Place(NamedTuple):
    segment: str
    row: int
    digest: bytes


class Records:
    """Records of `size` bytes in a folder, by keys of `KEY` bytes. Threads must take turns; processes need not."""

    def __init__(self, folder: Path, size: int) -> None:
        """Open the folder, which is made where it does not exist, and hold it as in use.

        Raises:
            OSError: it cannot be made.
        """
        self._folder, self._size = folder, size
        self._hold = Hold(folder)
        self._places: dict[bytes, list[_Place]] = {}
        self._seen: dict[str, int] = {}
        self._segment = uuid.uuid4().hex
        self._writable = True
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def count_bytes(self) -> int:
        """Count the bytes of all records in the folder, twice where two processes added one at the same time."""
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
            for row in range(whole):
                entry = content[row * ENTRY : (row + 1) * ENTRY]
                place = _Place(file.stem, first + row, entry[KEY:])
                self._places.setdefault(entry[:KEY], []).append(place)
            self._seen[file.stem] = first + whole

    def read(self, key: bytes) -> bytes | None:
        """Read the record of a key; None where none is whole, and the key is then no longer counted."""
        for place in list(self._places.get(key, ())):
            content = b""
            with contextlib.suppress(OSError), (self._folder / f"{place.segment}.rows").open("rb", buffering=0) as file:
                file.seek(place.row * self._size)
                content = file.read(self._size)
            if len(content) == self._size and _digest(key, content) == place.digest:
                return content
            self._places[key].remove(place)
        self._places.pop(key, None)
        return None

    def add(self, keys: Sequence[bytes], records: Iterable[bytes]) -> None:
        """Add records; where the disk does not take them, warn once and go on without."""
        if not self._writable:
            return
        contents = list(records)
        digests = [_digest(key, content) for key, content in zip(keys, contents, strict=True)]
        try:
            # Keys last: an entry then never stands for a record that a kill cut short.
            entries = [key + digest for key, digest in zip(keys, digests, strict=True)]
            for kind, written in (("rows", contents), ("keys", entries)):
                with (self._folder / f"{self._segment}.{kind}").open("ab") as file:
                    file.write(b"".join(written))
        except OSError as error:
            self._writable = False
            logging.getLogger(__name__).warning("%s takes no more: %s", self._folder, error.strerror or error)
            return
        first = self._seen.get(self._segment, 0)
        for row, (key, digest) in enumerate(zip(keys, digests, strict=True), first):
            self._places.setdefault(key, []).append(_Place(self._segment, row, digest))
        self._seen[self._segment] = first + len(contents)


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE, key=key).digest()
