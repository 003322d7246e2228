"""The records of a federation: whose rows are whose, which are left out, and why."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, Split

__all__ = ["ClientRows", "Federation", "Owned", "Skipped", "count_reasons", "gather_clients"]


@dataclass(frozen=True, eq=False)
class ClientRows:
    """One client's rows; any of the three may be empty.

    Attributes:
        name: stable over runs, unique in a federation.
        train, validation, test: row numbers [n] int64, each in the order in which it is to be read.
        held_out: the client never trains, so `train` is empty; it serves to try models on somebody new.
    """

    name: str
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]
    held_out: bool = field(default=False, kw_only=True)

    def rows_of(self, split: Split) -> Int[np.ndarray, " rows"]:
        """The rows of a split by its name."""
        return getattr(self, split)


@dataclass(frozen=True)
class Skipped:
    """A row that is not used, and why. `idx` is the data set's own name for it, where it has one."""

    row: int
    idx: str | None
    reason: str


@dataclass(frozen=True, eq=False)
class Federation:
    """All clients, in the order that gives them their numbers.

    Attributes:
        clients: sorted so that the same options give the same order everywhere.
        description: how it was made and what came out, as JSON: the partition with its key, concentration and seed,
            held-out clients, counts per client and, where topics were drawn, the realised mix.
        skipped: rows that belong to nobody.
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


@dataclass(frozen=True, eq=False)
class Owned:
    """Rows that have an owner and a split, before they are gathered by client.

    Attributes:
        rows: [n] row numbers, in the order in which clients are to read them.
        owners: [n] places in `names`.
        splits: [n] places in `SPLITS`.
        names: the clients, in order.
        skipped: rows that have no owner.
        about: for the description.
    """

    rows: Int[np.ndarray, " rows"]
    owners: Int[np.ndarray, " rows"]
    splits: Int[np.ndarray, " rows"]
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    about: dict[str, Any]


def gather_clients(owned: Owned) -> Federation:
    """Give every client its rows, split by split; one without rows stays, empty."""
    part = owned.owners * len(SPLITS) + owned.splits
    order = np.argsort(part, kind="stable")
    edges = np.searchsorted(part[order], np.arange(len(owned.names) * len(SPLITS) + 1))
    parts = [owned.rows[order[start:end]].astype(np.int64) for start, end in itertools.pairwise(edges)]
    clients = (ClientRows(name, *parts[3 * place : 3 * place + 3]) for place, name in enumerate(owned.names))
    return Federation(tuple(clients), owned.about, owned.skipped)


def count_reasons(skipped: Sequence[Skipped]) -> dict[str, int]:
    """Reason -> number of rows, the most frequent first."""
    return dict(Counter(entry.reason for entry in skipped).most_common())
