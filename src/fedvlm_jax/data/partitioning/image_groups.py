"""The images behind some rows as units: what stays with one client and in one split.

All rows about one picture, found by its content, are one unit. It counts once, with the label that most of its rows
have (of equally frequent ones the first). Units are put in order by a keyed hash of their content, never by their place
in the table: reordered files give the same order, and so does every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import Skipped
from fedvlm_jax.data.images import digest_rows
from fedvlm_jax.data.table import Table

if TYPE_CHECKING:
    from fedvlm_jax.data.config import DataOptions

__all__ = ["TRAIN", "Units", "find_units", "label_units", "order_units", "rank_units", "skip_rows", "split_units"]

TRAIN, VALIDATION, TEST = range(len(SPLITS))


@dataclass(frozen=True, eq=False)
class Units:
    """The units of N rows, n of which have an image.

    Attributes:
        kept: [N] which rows have one.
        of_row: [n] the unit of each of these.
        digests: the units' contents.
        skipped: the rows without.
    """

    kept: Bool[np.ndarray, " all"]
    of_row: Int[np.ndarray, " rows"]
    digests: tuple[bytes, ...]
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.digests)


def find_units(table: Table, rows: Int[np.ndarray, " all"]) -> Units:
    """Group rows by the content of their images."""
    digests, missing = digest_rows(table, rows)
    places: dict[bytes, int] = {}
    of_row = [places.setdefault(digest, len(places)) for digest in digests if digest is not None]
    kept = np.asarray([digest is not None for digest in digests], bool)
    skipped = skip_rows(table, rows[~kept], [missing[row] for row in rows[~kept].tolist()])
    return Units(kept, np.asarray(of_row, np.int64), tuple(places), skipped)


def skip_rows(table: Table, rows: Int[np.ndarray, " rows"], reasons: Sequence[str]) -> tuple[Skipped, ...]:
    """These rows belong to nobody, for these reasons."""
    idx = table.read_text("idx", rows) if "idx" in table.columns else [None] * len(rows)
    return tuple(Skipped(int(row), name, reason) for row, name, reason in zip(rows, idx, reasons, strict=True))


def label_units(units: Units, labels: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " units"]:
    """Every unit's most frequent label; of equally frequent ones the first."""
    pairs, counts = np.unique(np.stack([units.of_row, labels]), axis=1, return_counts=True)
    by_count = np.lexsort((pairs[1], -counts, pairs[0]))
    _, first = np.unique(pairs[0][by_count], return_index=True)
    return pairs[1][by_count][first]


def rank_units(units: Units, seed: int, purpose: bytes = b"") -> Int[np.ndarray, " units"]:
    """Every unit's place in an order that depends on its content, the seed and the purpose alone."""
    key = int(seed).to_bytes(16, "little")
    hashed = [hashlib.blake2b(digest, key=key, person=purpose, digest_size=16).digest() for digest in units.digests]
    rank = np.empty(len(units), np.int64)
    rank[sorted(range(len(units)), key=hashed.__getitem__)] = np.arange(len(units))
    return rank


def order_units(
    units: Units, labels: Int[np.ndarray, " units"], splits: Int[np.ndarray, " rows"] | None, seed: int
) -> Int[np.ndarray, " units"]:
    """The order in which clients take runs of units: drawn, with labels and given splits evenly mixed in every run."""
    strata = labels * len(SPLITS)
    if splits is not None:
        split = np.full(len(units), len(SPLITS) - 1)
        np.minimum.at(split, units.of_row, splits)
        strata = strata + split
    rank = rank_units(units, seed, b"partition")
    place, size = _count_off(strata, rank)
    return np.lexsort((rank, (place + 0.5) / size))


def split_units(
    owners: Int[np.ndarray, " units"], rank: Int[np.ndarray, " units"], options: "DataOptions"
) -> Int[np.ndarray, " units"]:
    """Places in `SPLITS`: every owner's first units by rank are for test, the next for validation, the others train."""
    place, size = _count_off(owners, rank)
    test = np.floor(options.test_share * size + 0.5)
    validation = np.floor(options.validation_share * size + 0.5)
    return np.where(place < test, TEST, np.where(place < test + validation, VALIDATION, TRAIN))


def _count_off(groups: Int[np.ndarray, " units"], rank: Int[np.ndarray, " units"]) -> tuple[np.ndarray, np.ndarray]:
    """Every unit's place by rank in its group, and the size of that group."""
    order = np.lexsort((rank, groups))
    _, start, which, sizes = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    place, size = np.empty(len(groups), np.int64), np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - start[which]
    size[order] = sizes[which]
    return place, size
