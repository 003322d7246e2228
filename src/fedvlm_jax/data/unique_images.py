"""Unique images behind a set of rows: found by content, read when needed, checked before training.

Rows share images (several questions about one picture, one picture with several clients), so frozen features are
computed and cached once per content. Pixels are never kept: an `Images` knows where its bytes lie. Hashing and checking
run in threads (both release the interpreter's lock) and are done once per table (`image_index.py`).
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import MAX_IMAGE_PIXELS
from fedvlm_jax.data.image_decoding import BrokenImageError, decode_picture
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

WORKERS = min(8, os.cpu_count() or 1)  # threads that read, hash and decode
PART = 64  # images that a thread takes at a time: a task per image costs more than hashing it


@dataclass(frozen=True, eq=False)
class Images:
    """Unique images in the order of their first row.

    Attributes:
        table: where the bytes lie.
        rows: [I] one row of the table for each image.
        keys: the images' content hashes as hex, the natural key of a feature cache.
    """

    table: Table
    rows: Int[np.ndarray, " images"]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def decode(self, index: int) -> "Image.Image":
        """Decode an image in RGB, as `decode_picture` does.

        Raises:
            UserError: the bytes are missing, cut short, or no image, which happens after `find_broken` where files are
                removed or changed; or they are not those of the image's key, under which its features are cached.
        """
        try:
            return self._decode(index)
        except BrokenImageError as error:
            row = int(self.rows[index])
            lookup = self.table.describe_lookup(row)
            raise UserError(
                f"row {row} of {self.table.name}: {error}{f' (it {lookup})' if lookup else ''}. If it was sound when "
                "the run began, put it back; a new run leaves the row out"
            ) from error

    def _decode(self, index: int) -> "Image.Image":
        row = int(self.rows[index])
        encoded = self.table.read_image(row)
        if _digest(encoded).hex() != self.keys[index]:
            raise UserError(
                f"the image of row {row} of {self.table.name} is not what it was when it was first read: its file was "
                "changed, or the copy of the table in the cache is damaged (fedvlm cache --clear arrow removes that)"
            )
        return decode_picture(encoded, max_pixels=self.table.max_image_pixels)

    def find_broken(self, workers: int = WORKERS) -> dict[int, str]:
        """Decode every image once (JPEGs at an eighth of their size) and return index -> reason for those that fail."""
        facts = self.table.facts
        as_usual = self.table.max_image_pixels == MAX_IMAGE_PIXELS  # what is kept holds for that bound alone
        known = facts.sound if as_usual else frozenset[int]()
        unknown = [index for index, row in enumerate(self.rows.tolist()) if row not in known]
        broken = {index: reason for index, reason in _map_parts(self._check, unknown, workers) if reason}
        if as_usual and len(unknown) > len(broken):
            facts.sound.update(int(self.rows[index]) for index in unknown if index not in broken)
            facts.save(self.table.is_embedded)
        return broken

    def number_pictures(self, workers: int = WORKERS) -> tuple[Int[np.ndarray, " images"], dict[int, str]]:
        """Decode every image whole, as training does, and number them [I] so that equal pixels have equal numbers.

        Files differ where pictures do not: a copy was saved anew, or lost its camera's data.

        Returns:
            The index of the first image with these pixels, or its index where it fails; and index -> reason for those
            that fail.
        """

        def look(index: int) -> bytes | str:
            try:
                picture = self._decode(index)
            except BrokenImageError as error:
                return str(error)
            return hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16).digest()

        numbers, first, broken = np.arange(len(self)), dict[bytes, int](), dict[int, str]()
        for index, found in _map_parts(look, range(len(self)), workers):
            if isinstance(found, str):
                broken[index] = found
            else:
                numbers[index] = first.setdefault(found, index)
        return numbers, broken

    def select(self, kept: Sequence[int] | np.ndarray) -> "Images":
        """Select the images at the given positions, in that order."""
        kept = np.asarray(kept, np.int64)
        return Images(self.table, self.rows[kept], tuple(self.keys[index] for index in kept))

    def _check(self, index: int) -> str | None:
        try:
            encoded = self.table.read_image(int(self.rows[index]))
            decode_picture(encoded, max_pixels=self.table.max_image_pixels, quick=True)
        except BrokenImageError as error:
            return str(error)
        return None


def unique_images(
    table: Table, rows: Sequence[int] | np.ndarray
) -> tuple[Images, Int[np.ndarray, " rows"], dict[int, str]]:
    """Group rows by the content of their images.

    Args:
        table: where the rows lie.
        rows: [N] row numbers.

    Returns:
        The unique images [I]; for every row the index of its image [N] int32, or -1 where it has none; and
        row -> reason for the latter.
    """
    digests, missing = digest_rows(table, rows)
    places: dict[bytes, int] = {}
    first: list[int] = []
    index = np.full(len(digests), -1, np.int32)
    for position, (row, digest) in enumerate(zip(rows, digests, strict=True)):
        if digest is not None:
            if digest not in places:
                first.append(int(row))
            index[position] = places.setdefault(digest, len(places))
    images = Images(table, np.asarray(first, np.int64), tuple(digest.hex() for digest in places))
    return images, index, missing


def digest_rows(
    table: Table, rows: Sequence[int] | np.ndarray, workers: int = WORKERS
) -> tuple[list[bytes | None], dict[int, str]]:
    """Digest every row's encoded image by BLAKE2b-128, None where it has none, and give row -> reason for these."""

    def digest(row: int) -> bytes | str:
        try:
            return _digest(table.read_image(row))
        except BrokenImageError as error:
            return str(error)

    known = table.facts.digests
    unknown = list(dict.fromkeys(row for row in map(int, rows) if row not in known))
    missing: dict[int, str] = {}
    for row, found in _map_parts(digest, unknown, workers):
        if isinstance(found, str):
            missing[row] = found
        else:
            known[row] = found
    if len(unknown) > len(missing):
        table.facts.save(table.is_embedded)
    return [known.get(row) for row in map(int, rows)], missing


def _digest(encoded: bytes) -> bytes:
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _map_parts(work: Callable[[int], T], items: Sequence[int], workers: int) -> Iterator[tuple[int, T]]:
    """Yield item and result, in order."""
    parts = [items[start : start + PART] for start in range(0, len(items), PART)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for part, results in zip(parts, pool.map(lambda part: [work(item) for item in part], parts), strict=True):
            yield from zip(part, results, strict=True)
