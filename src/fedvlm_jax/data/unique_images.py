"""Unique images behind a set of rows: found by content, read when needed, checked before training.

Rows share images, so frozen features are computed and cached once per content. Pixels are never kept. Hashing and
checking run in threads (both release the interpreter's lock) and are done once per table (`ImageFacts`).
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int
from PIL import Image

from fedvlm_jax.data.config import MAX_IMAGE_PIXELS
from fedvlm_jax.data.image_decoding import BrokenImageError, decode_picture
from fedvlm_jax.data.table import RowNumbers, Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.digests import DIGEST_SIZE

T = TypeVar("T", bound=Hashable)
WORKERS = min(8, os.cpu_count() or 1)  # threads that read, hash and decode
PART = 64  # images that a thread takes at a time: a task per image costs more than hashing it


@dataclass(frozen=True, eq=False)
class Images:
    """Unique images in the order of their first row."""

    table: Table
    rows: Int[np.ndarray, " images"]  # a row of the table for each
    places: Int[np.ndarray, " images"]  # its place in that row, 0 the first
    keys: tuple[str, ...]  # content hashes as hex, the natural key of a feature cache

    def __len__(self) -> int:
        return len(self.keys)

    def decode(self, index: int) -> Image.Image:
        """Decode an image in RGB, as `decode_picture` does.

        Raises:
            UserError: the image is broken, or not that of its key any more: files were removed or changed.
        """
        try:
            return self._decode(index)
        except BrokenImageError as error:
            row, place = int(self.rows[index]), int(self.places[index])
            lookup = self.table.describe_lookup(row, place)
            raise UserError(
                f"row {row} of {self.table.name}: {error}{f' (it {lookup})' if lookup else ''}. If it was sound when "
                "the run began, put it back; a new run leaves the row out"
            ) from error

    def _decode(self, index: int) -> Image.Image:
        row = int(self.rows[index])
        encoded = self.table.read_image(row, int(self.places[index]))
        if _digest(encoded).hex() != self.keys[index]:
            raise UserError(
                f"the image of row {row} of {self.table.name} is not what it was when it was first read: its file was "
                "changed, or the copy of the table in the cache is damaged (fedvlm cache --clear arrow removes that)"
            )
        return decode_picture(encoded, max_pixels=self.table.max_image_pixels)

    def read_sizes(self) -> list[tuple[int, int]]:
        """Read height and width in pixels of every image, as it is shown; (1, 1) where it is broken."""
        found, _ = _try_all(lambda index: self._decode(index).size, range(len(self)))
        return [(height, width) for width, height in (found.get(index, (1, 1)) for index in range(len(self)))]

    def find_broken(self) -> dict[int, str]:
        """Decode every image once (JPEGs at an eighth of their size) and return index -> reason for those that fail."""
        table, facts, bound = self.table, self.table.facts, self.table.max_image_pixels
        known = facts.sound if bound == MAX_IMAGE_PIXELS else set[int]()  # what is kept holds for that bound alone
        numbers = (self.places * len(table) + self.rows).tolist()
        sound, broken = _try_all(
            lambda number: decode_picture(_read(table, number), max_pixels=bound, quick=True).size,
            [number for number in numbers if number not in known],
        )
        if bound == MAX_IMAGE_PIXELS and sound:
            facts.sound.update(sound)
            _save_facts(table)
        return {index: broken[number] for index, number in enumerate(numbers) if number in broken}

    def number_pictures(self) -> tuple[Int[np.ndarray, " images"], dict[int, str]]:
        """Decode every image whole, as training does, and number them [I] so that equal pixels have equal numbers.

        Files differ where pictures do not: a copy was saved anew. Those that fail are in index -> reason.
        """

        def digest_pixels(index: int) -> bytes:
            picture = self._decode(index)
            return _digest(repr(picture.size).encode() + picture.tobytes())

        digests, broken = _try_all(digest_pixels, range(len(self)))
        return number_distinct(digests.get(index, index) for index in range(len(self)))[1], broken

    def select(self, kept: RowNumbers) -> "Images":
        """Select the images at the given positions, in that order."""
        kept = np.asarray(kept, np.int64)
        return Images(self.table, self.rows[kept], self.places[kept], tuple(self.keys[index] for index in kept))

    def narrow(self, index: Int[np.ndarray, "rows pictures"]) -> tuple["Images", Int[np.ndarray, "rows pictures"]]:
        """Keep the images that rows have, of their indices [N, V], -1 for none.

        Returns them, and the rows' indices into them, int32, whose V is the most that a row has.
        """
        there = index >= 0
        used, numbers = np.unique(index[there], return_inverse=True)
        narrowed = np.full(index.shape, -1, np.int32)
        narrowed[there] = numbers
        return self.select(used), narrowed[:, : max(1, int(there.sum(axis=1).max(initial=0)))]


def unique_images(table: Table, rows: RowNumbers) -> tuple[Images, Int[np.ndarray, "rows pictures"], dict[int, str]]:
    """Find the unique images of rows [N], by content.

    Returns the unique images [I]; the indices of every row's images [N, V] int32, -1 where it has none at that place,
    V being `table.most_pictures`; and row -> reason for rows without an image, or of whose images one is missing, which
    count as having none.
    """
    digests, missing = digest_rows(table, rows)
    counts = np.asarray([len(held) for held in digests], np.int64)
    distinct, numbers = number_distinct(itertools.chain.from_iterable(digests))
    index = np.full((len(digests), table.most_pictures), -1, np.int32)
    there = np.arange(index.shape[1]) < counts[:, None]
    index[there] = numbers
    _, first = np.unique(numbers, return_index=True)
    owners, places = (found[first] for found in np.nonzero(there))
    used = np.asarray(rows, np.int64)[owners]
    return Images(table, used, places, tuple(digest.hex() for digest in distinct)), index, missing


def number_distinct(values: Iterable[T | None]) -> tuple[list[T], Int[np.ndarray, " values"]]:
    """List distinct values, and number all of them [N] by their places in that list; None is -1.

    >>> distinct, numbers = number_distinct(["cat", None, "dog", "cat"])
    >>> distinct, numbers.tolist()
    (['cat', 'dog'], [0, -1, 1, 0])
    """
    places: dict[T, int] = {}
    numbers = [-1 if value is None else places.setdefault(value, len(places)) for value in values]
    return list(places), np.asarray(numbers, np.int64)


def digest_rows(table: Table, rows: RowNumbers) -> tuple[list[tuple[bytes, ...]], dict[int, str]]:
    """Digest every row's encoded images by BLAKE2b-128, in their order.

    There are none for a row without an image, or of whose images one is missing; these are in row -> reason.
    """
    known, count = table.facts.digests, len(table)
    most = table.count_pictures(rows).tolist()
    asked = [range(row, row + some * count, count) for row, some in zip(map(int, rows), most, strict=True)]
    unknown = [number for numbers in asked for number in numbers if number not in known]
    found, broken = _try_all(lambda number: _digest(_read(table, number)), list(dict.fromkeys(unknown)))
    if found:
        known.update(found)
        _save_facts(table)
    missing = {numbers[0]: broken[n] for numbers in asked for n in reversed(numbers) if n in broken} if broken else {}
    whole = (() if numbers[0] in missing else tuple(known[number] for number in numbers) for numbers in asked)
    return list(whole), missing


def _read(table: Table, number: int) -> bytes:
    """Read an image by its number (`ImageFacts`)."""
    place, row = divmod(number, len(table))
    return table.read_image(row, place)


def _save_facts(table: Table) -> None:
    table.facts.save(lambda number: table.is_embedded(*divmod(number, len(table))[::-1]))


def _digest(encoded: bytes) -> bytes:
    return hashlib.blake2b(encoded, digest_size=DIGEST_SIZE).digest()


def _try_all(work: Callable[[int], T], items: Sequence[int]) -> tuple[dict[int, T], dict[int, str]]:
    """Run in threads; return item -> result, and item -> reason where the image is broken."""
    results, reasons = dict[int, T](), dict[int, str]()

    def run(part: Sequence[int]) -> None:
        for item in part:
            try:
                results[item] = work(item)
            except BrokenImageError as error:
                reasons[item] = str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(run, [items[start : start + PART] for start in range(0, len(items), PART)]):
            pass  # whatever else a thread raised is raised here
    return results, reasons
