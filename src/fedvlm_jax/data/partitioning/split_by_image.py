"""Rows grouped by the picture that they show, so that all rows of a picture stay with one client and in one split.

A group counts once, with the label that most of its rows have (of equally frequent ones the first). Groups are put in
order by a keyed hash of the picture's bytes, never by their place in the table: reordered files give the same order.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.distinct import number_distinct
from fedvlm_jax.data.skipped_rows import Skipped, skip_rows
from fedvlm_jax.data.sources import parquet
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.unique_images import digest_rows

TRAIN, VALIDATION, TEST = range(len(SPLITS))


@dataclass(frozen=True, eq=False)
class ImageGroups:
    """The groups of N rows, n of which have an image.

    Attributes:
        kept: [N] which rows have an image.
        of_row: [n] the group of each of these.
        digests: the groups' contents.
        skipped: the rows without an image.
    """

    kept: Bool[np.ndarray, " all"]
    of_row: Int[np.ndarray, " rows"]
    digests: list[bytes]
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.digests)


def group_by_image(table: Table, rows: Int[np.ndarray, " all"]) -> ImageGroups:
    """Group rows by the content of their images."""
    digests, missing = digest_rows(table, rows)
    distinct, numbers = number_distinct(digests)
    kept = numbers >= 0
    lost = rows[~kept]
    return ImageGroups(kept, numbers[kept], distinct, skip_rows(table, lost, [missing[row] for row in lost.tolist()]))


def label_groups(groups: ImageGroups, labels: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " groups"]:
    """Find every group's most frequent label; of equally frequent ones the first."""
    pairs, counts = np.unique(np.stack([groups.of_row, labels]), axis=1, return_counts=True)
    # The last key sorts first: by group, then by falling count, then by label.
    by_count = np.lexsort((pairs[1], -counts, pairs[0]))
    _, first = np.unique(pairs[0][by_count], return_index=True)
    return pairs[1][by_count][first]


def rank_groups(groups: ImageGroups, seed: int, purpose: bytes = b"") -> Int[np.ndarray, " groups"]:
    """Rank groups by a hash of their content, the seed and the purpose alone."""
    key = int(seed).to_bytes(16, "little")
    hashed = [hashlib.blake2b(digest, key=key, person=purpose, digest_size=16).digest() for digest in groups.digests]
    rank = np.empty(len(groups), np.int64)
    rank[sorted(range(len(groups)), key=hashed.__getitem__)] = np.arange(len(groups))
    return rank


def order_groups(
    groups: ImageGroups, labels: Int[np.ndarray, " groups"], splits: Int[np.ndarray, " rows"] | None, seed: int
) -> Int[np.ndarray, " groups"]:
    """Draw the order in which clients take runs of groups, labels and given splits evenly mixed in every run."""
    strata = labels * len(SPLITS)
    if splits is not None:
        split = np.full(len(groups), len(SPLITS) - 1)
        np.minimum.at(split, groups.of_row, splits)
        strata = strata + split
    # Another purpose than that of the splits, so that the two draws are independent.
    rank = rank_groups(groups, seed, b"partition")
    place, size = _count_off(strata, rank)
    return np.lexsort((rank, (place + 0.5) / size))


def split_groups(
    owners: Int[np.ndarray, " groups"], rank: Int[np.ndarray, " groups"], options: DataOptions
) -> Int[np.ndarray, " groups"]:
    """Put every owner's first groups by rank into test, the next into validation, the others into train."""
    assert isinstance(options, parquet.Options)  # a set of another form has splits already
    place, size = _count_off(owners, rank)
    test = np.floor(options.test_share * size + 0.5)
    validation = np.floor(options.validation_share * size + 0.5)
    return np.where(place < test, TEST, np.where(place < test + validation, VALIDATION, TRAIN))


def _count_off(strata: Int[np.ndarray, " groups"], rank: Int[np.ndarray, " groups"]) -> tuple[np.ndarray, np.ndarray]:
    """Return every group's place by rank in its stratum, and the size of that stratum.

    >>> place, size = _count_off(np.asarray([7, 7, 4]), np.asarray([2, 0, 1]))
    >>> place.tolist(), size.tolist()
    ([1, 0, 0], [2, 2, 1])
    """
    order = np.lexsort((rank, strata))
    _, start, which, sizes = np.unique(strata[order], return_index=True, return_inverse=True, return_counts=True)
    place, size = np.empty(len(strata), np.int64), np.empty(len(strata), np.int64)
    place[order] = np.arange(len(strata)) - start[which]
    size[order] = sizes[which]
    return place, size
