"""A federation: whose rows are whose, and which of them train, validate and test."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, Split
from fedvlm_jax.data.skipped_rows import Skipped


@dataclass(frozen=True, eq=False)
class ClientRows:
    """Rows of one client; any of the three may be empty.

    Attributes:
        name: stable over runs, unique in a federation.
        train, validation, test: row numbers [n] int64, each in the order in which it is to be read.
        held_out: the client never trains, so `train` is empty; it serves to try models on a newcomer.
    """

    name: str
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]
    held_out: bool = field(default=False, kw_only=True)

    def rows_of(self, split: Split) -> Int[np.ndarray, " rows"]:
        """Return the rows of a split by its name."""
        return getattr(self, split)


@dataclass(frozen=True, eq=False)
class Federation:
    """All clients, in the order that gives them their numbers.

    Attributes:
        clients: sorted so that the same options give the same order everywhere.
        description: how it was made and what came out, as JSON: the partition with its key, concentration and seed,
            held-out clients, counts per client and, where topics were drawn, the realised mix.
        skipped: rows without a client.
    """

    clients: tuple[ClientRows, ...]
    description: dict[str, Any]
    skipped: tuple[Skipped, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names, in order."""
        return tuple(client.name for client in self.clients)

    @property
    def rows(self) -> Int[np.ndarray, " rows"]:
        """Every row in use: client by client, train, validation, test."""
        parts = [client.rows_of(split) for client in self.clients for split in SPLITS]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def note(self, **facts: Any) -> "Federation":
        """Return it with more facts in its description.

        >>> Federation((), {"partition": "iid"}).note(left_out=[]).description
        {'partition': 'iid', 'left_out': []}
        """
        return dataclasses.replace(self, description={**self.description, **facts})


def gather_clients(
    rows: Int[np.ndarray, " rows"],
    owners: Int[np.ndarray, " rows"],
    splits: Int[np.ndarray, " rows"],
    names: tuple[str, ...],
    skipped: tuple[Skipped, ...],
    **description: Any,
) -> Federation:
    """Give every client its rows, split by split; a client without rows stays, empty.

    Args:
        rows: [n] row numbers, in the order in which clients are to read them.
        owners: [n] the client of each, as a place in `names`.
        splits: [n] the split of each, as a place in `SPLITS`.
        names: the clients, in order.
        skipped: rows without a client.
        description: of the federation.

    >>> rows, owners, splits = np.asarray([7, 8, 9]), np.asarray([1, 0, 1]), np.asarray([0, 0, 2])
    >>> made = gather_clients(rows, owners, splits, ("ann", "bob"), ())
    >>> [(client.name, client.train.tolist(), client.test.tolist()) for client in made.clients]
    [('ann', [8], []), ('bob', [7], [9])]
    """
    part = owners * len(SPLITS) + splits
    order = np.argsort(part, kind="stable")  # stable: rows keep the order in which clients read them
    edges = np.searchsorted(part[order], np.arange(len(names) * len(SPLITS) + 1))
    parts = [rows[order[start:end]].astype(np.int64) for start, end in itertools.pairwise(edges)]
    clients = (ClientRows(name, *parts[3 * place : 3 * place + 3]) for place, name in enumerate(names))
    return Federation(tuple(clients), description, skipped)
