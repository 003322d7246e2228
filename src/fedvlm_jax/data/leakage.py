"""Leaks: the same image, or the same text, in two splits or with two clients.

An image in train and in test makes a test score too good; one with two clients makes them less apart than they seem
(some sets mean it so). Sameness is that of the encoded bytes, or of the pixels where images are decoded: a picture that
was scaled, or saved anew with loss, is another one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import Federation

SHOWN = 5  # examples, and pairs of clients, that are named


@dataclass(frozen=True, eq=False)
class Places:
    """Rows in use: [N] row numbers, each row's client as a number, each row's split as a place in `SPLITS`."""

    rows: Int[np.ndarray, " rows"]
    clients: Int[np.ndarray, " rows"]
    splits: Int[np.ndarray, " rows"]


def place_rows(federation: Federation) -> Places:
    """Line up a federation's rows as `Federation.rows` does, each with its client and split."""
    sizes = np.asarray([[len(client.rows_of(split)) for split in SPLITS] for client in federation.clients], np.int64)
    places = np.repeat(np.arange(sizes.size), sizes.reshape(-1))
    return Places(federation.rows, places // len(SPLITS), places % len(SPLITS))


def find_overlap(things: Int[np.ndarray, " rows"], places: Places, names: Sequence[str]) -> dict[str, Any]:
    """Find things that are in two splits, or with two clients.

    Args:
        things: [N] every row's thing by its number; -1 where it has none.
        places: of these N rows.
        names: the clients'.

    Returns:
        As JSON: `distinct`, the number of different things. `between_splits`: for "train/validation", "train/test" and
        "validation/test" the things in both (`distinct`), the `rows` of the second split about them, those among these
        whose thing is in the first split of the same client (`rows_of_the_same_client`), and `examples`: a row of the
        first split with one of the second. `between_clients`: the things with more than one client (`distinct`), the
        `rows` about them, and the pairs of clients that share `most`: both names and how many things.
    """
    known = things >= 0
    numbers, rows = things[known], places.rows[known]
    clients, splits = places.clients[known], places.splits[known]
    count = int(numbers.max(initial=-1)) + 1
    met = np.zeros((count, len(SPLITS)), bool)
    met[numbers, splits] = True
    # Thing and client as one number, to be looked up among those of another split.
    held = numbers * len(names) + clients

    def compare(first: int, second: int) -> dict[str, Any]:
        both = met[:, first] & met[:, second]
        earlier, later = (np.flatnonzero((splits == split) & both[numbers]) for split in (first, second))
        # Backwards, so that a thing's first row is the one that stays.
        row_of = dict(zip(numbers[earlier][::-1].tolist(), rows[earlier][::-1].tolist(), strict=True))
        shown = zip(numbers[later[:SHOWN]].tolist(), rows[later[:SHOWN]].tolist(), strict=True)
        return {
            "distinct": int(both.sum()),
            "rows": len(later),
            "rows_of_the_same_client": int(np.isin(held[later], held[earlier]).sum()),
            "examples": [[row_of[thing], row] for thing, row in shown],
        }

    holders = np.unique(np.stack([numbers, clients]), axis=1)
    shared = np.bincount(holders[0], minlength=count) > 1
    pairs = itertools.combinations(range(len(SPLITS)), 2)
    return {
        "distinct": int(met.any(axis=1).sum()),
        "between_splits": {f"{SPLITS[first]}/{SPLITS[second]}": compare(first, second) for first, second in pairs},
        "between_clients": {
            "distinct": int(shared.sum()),
            "rows": int(shared[numbers].sum()),
            "most": _count_pairs(holders[:, shared[holders[0]]], names),
        },
    }


def _count_pairs(holders: Int[np.ndarray, "2 held"], names: Sequence[str]) -> list[list[Any]]:
    """Count what the pairs of clients with most in common share, out of (thing, client)."""
    from scipy.sparse import csr_array, triu

    if not holders.size:
        return []
    held = csr_array((np.ones(holders.shape[1], np.int64), holders), shape=(int(holders[0].max()) + 1, len(names)))
    common = triu(held.T @ held, k=1).tocoo()
    left, right, count = (np.asarray(values, np.int64) for values in (common.row, common.col, common.data))
    most = np.lexsort((right, left, -count))[:SHOWN]
    return [[names[int(left[at])], names[int(right[at])], int(count[at])] for at in most.tolist()]
