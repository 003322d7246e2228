"""What stands on both sides of a line: the same image, or the same text, in two splits or with two clients.

An image in train and in test makes a test score too good; one with two clients makes them less apart than they seem
(some sets mean it so). Sameness is that of the encoded bytes, or of the pixels where images are decoded: a picture that
was scaled, or saved anew with loss, is another one.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, Split
from fedvlm_jax.data.federated_dataset import Federation

__all__ = ["Crossing", "Overlap", "Places", "find_overlap", "number_things", "place_rows"]

SHOWN = 5
"""Examples, and pairs of clients, that are named."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where every row in use stands: [N] row numbers, places among the clients, places in `SPLITS`."""

    rows: Int[np.ndarray, " rows"]
    clients: Int[np.ndarray, " rows"]
    splits: Int[np.ndarray, " rows"]


@dataclass(frozen=True)
class Crossing:
    """Things that are in two splits, with whichever clients.

    Attributes:
        splits: the two.
        things: how many.
        rows: rows of the second split that are about them.
        own_rows: those among them whose thing is in the first split of the very same client.
        examples: some of these rows, each with one of the first split.
    """

    splits: tuple[Split, Split]
    things: int
    rows: int
    own_rows: int
    examples: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Overlap:
    """What one kind of thing has in common across splits and clients.

    Attributes:
        things: how many different ones there are.
        crossings: train and validation, train and test, validation and test.
        shared: things with more than one client.
        shared_rows: rows that are about them.
        pairs: the two clients, and how much they share, for those that share most.
    """

    things: int
    crossings: tuple[Crossing, ...]
    shared: int
    shared_rows: int
    pairs: tuple[tuple[str, str, int], ...]

    @property
    def leaks(self) -> tuple[Crossing, ...]:
        """The crossings that are not empty."""
        return tuple(crossing for crossing in self.crossings if crossing.things)

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes."""
        crossings = {
            f"{one.splits[0]}/{one.splits[1]}": {
                "distinct": one.things,
                "rows": one.rows,
                "rows_of_the_same_client": one.own_rows,
                "examples": [list(pair) for pair in one.examples],
            }
            for one in self.crossings
        }
        between = {"distinct": self.shared, "rows": self.shared_rows, "most": [list(pair) for pair in self.pairs]}
        return {"distinct": self.things, "between_splits": crossings, "between_clients": between}


def place_rows(federation: Federation) -> Places:
    """Line up a federation's rows as `Federation.rows` does, each with its client and split."""
    sizes = np.asarray([[len(client.rows_of(split)) for split in SPLITS] for client in federation.clients], np.int64)
    places = np.repeat(np.arange(sizes.size), sizes.reshape(-1))
    return Places(federation.rows, places // len(SPLITS), places % len(SPLITS))


def number_things(things: Sequence[Hashable | None]) -> Int[np.ndarray, " rows"]:
    """Number things in the order in which they are met, alike ones alike; None is -1."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([-1 if thing is None else numbers.setdefault(thing, len(numbers)) for thing in things], np.int64)


def find_overlap(things: Int[np.ndarray, " rows"], places: Places, names: Sequence[str]) -> Overlap:
    """Find what is in two splits, or with two clients.

    Args:
        things: [N] every row's thing by its number; -1 where it has none.
        places: where these N rows stand.
        names: the clients'.
    """
    there = things >= 0
    numbers, clients, splits, rows = things[there], places.clients[there], places.splits[there], places.rows[there]
    count = int(numbers.max(initial=-1)) + 1
    met = np.zeros((count, len(SPLITS)), bool)
    met[numbers, splits] = True
    stands = Places(rows, clients, splits)
    holders = np.unique(np.stack([numbers, clients]), axis=1)
    shared = np.bincount(holders[0], minlength=count) > 1
    return Overlap(
        things=int(met.any(axis=1).sum()),
        crossings=tuple(_cross(numbers, stands, met, *pair) for pair in itertools.combinations(range(len(SPLITS)), 2)),
        shared=int(shared.sum()),
        shared_rows=int(shared[numbers].sum()),
        pairs=_count_pairs(holders[:, shared[holders[0]]], names),
    )


def _cross(numbers: Int[np.ndarray, " rows"], places: Places, met: np.ndarray, first: int, second: int) -> Crossing:
    both = met[:, first] & met[:, second]
    earlier, later = (np.flatnonzero((places.splits == split) & both[numbers]) for split in (first, second))
    # Thing and client as one number, to be looked up among those of the first split.
    held = numbers * (int(places.clients.max(initial=0)) + 1) + places.clients
    own = np.isin(held[later], held[earlier])
    _, where = np.unique(numbers[earlier], return_index=True)  # every thing's first row, things ascending
    shown = later[:SHOWN]
    partners = earlier[where[np.searchsorted(numbers[earlier][where], numbers[shown])]] if len(shown) else shown
    examples = zip(places.rows[partners].tolist(), places.rows[shown].tolist(), strict=True)
    return Crossing((SPLITS[first], SPLITS[second]), int(both.sum()), len(later), int(own.sum()), tuple(examples))


def _count_pairs(holders: Int[np.ndarray, "2 held"], names: Sequence[str]) -> tuple[tuple[str, str, int], ...]:
    """The pairs of clients with most in common, out of (thing, client)."""
    from scipy.sparse import csr_array, triu

    if not holders.size:
        return ()
    held = csr_array((np.ones(holders.shape[1], np.int64), holders), shape=(int(holders[0].max()) + 1, len(names)))
    common = triu(held.T @ held, k=1).tocoo()
    one, other, count = (np.asarray(values, np.int64) for values in (common.row, common.col, common.data))
    most = np.lexsort((other, one, -count))[:SHOWN]
    return tuple((names[int(one[at])], names[int(other[at])], int(count[at])) for at in most.tolist())
