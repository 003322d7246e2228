"""From one table to many clients: whose rows are whose, and which of them train, validate and test.

A source with a `client` column says it itself; else `origin_dataset` is the natural client of data in RLAIF-V's form.
A source without a `split` column is split here, inside every client and by the content of the images, so that no image
is in two splits, not even with different clients.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.images import digest_rows
from fedvlm_jax.data.options import SPLITS, Split
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError

if TYPE_CHECKING:
    from fedvlm_jax.data.options import DataOptions

__all__ = ["ClientRows", "Federation", "Skipped", "check_federation", "count_reasons", "federate", "federate_by_column"]


@dataclass(frozen=True, eq=False)
class ClientRows:
    """One client's rows; any of the three may be empty.

    Attributes:
        name: stable over runs, unique in a federation.
        train, validation, test: row numbers [n] int64, each in the order in which it is to be read.
    """

    name: str
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]

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
        description: what came out, as JSON: counts per client and, where topics were drawn, the realised mix.
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


def federate(table: Table, options: "DataOptions", seed: int) -> Federation:
    """Cut a table into clients, as its data set does it, or by its columns.

    Args:
        table: from `read_table(options.source)`.
        options: `min_examples` leaves clients out; the rest means what its help says.
        seed: a non-negative integer; the same seed gives the same federation everywhere.

    Raises:
        UserError: no column says who the clients are, an unknown split, no clients, nothing to train on, or a negative
            seed.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}; expected 0 or a positive integer.")
    from fedvlm_jax.data.registry import find_sets

    named = find_sets().get(table.name)
    federation = named.federate(table, options, seed) if named else federate_by_column(table, options, seed)
    return check_federation(federation, options)


def federate_by_column(table: Table, options: "DataOptions", seed: int) -> Federation:
    """Clients from column `client`, else `origin_dataset`; splits from column `split`, else drawn by image content.

    Raises:
        UserError: neither client column is there, or the split column has values other than train, validation, test.
    """
    column = next((name for name in ("client", "origin_dataset") if name in table.columns), None)
    if column is None:
        raise UserError(
            f"{table.name} does not say whose rows are whose: it has no column 'client' nor 'origin_dataset', only "
            f"{', '.join(table.columns)}. Add a text column 'client'."
        )
    owners = [owner.strip() if owner else None for owner in table.read_text(column)]
    rows_of: dict[str, list[int]] = {}
    skipped: list[Skipped] = []
    for row, owner in enumerate(owners):
        if owner:
            rows_of.setdefault(owner, []).append(row)
        else:
            skipped.append(Skipped(row, _read_idx(table, row), f"no {column}"))
    if "split" in table.columns:
        split_of = _read_splits(table)
        origin = "column 'split'"
    else:
        split_of = _draw_splits(table, rows_of, options, seed)
        origin = f"drawn by image content: {options.validation_share:g} validation, {options.test_share:g} test"
    clients = tuple(
        ClientRows(name, *(np.asarray([r for r in rows if split_of[r] == split], np.int64) for split in SPLITS))
        for name, rows in sorted(rows_of.items())
    )
    return Federation(clients, {"clients_from": f"column {column!r}", "splits_from": origin}, tuple(skipped))


def check_federation(federation: Federation, options: "DataOptions") -> Federation:
    """Leave out clients below `min_examples`, describe the rest, and refuse what cannot be trained on.

    Raises:
        UserError: no client is left, or none of them has a training row.
    """
    kept = tuple(client for client in federation.clients if len(client.train) >= options.min_examples)
    out = [client.name for client in federation.clients if len(client.train) < options.min_examples]
    if not kept:
        raise UserError(
            f"--data {options.source}: no client is left of {len(federation.clients)}; --data.min-examples is "
            f"{options.min_examples} and the largest client has "
            f"{max((len(client.train) for client in federation.clients), default=0)} training rows."
        )
    if not any(len(client.train) for client in kept):
        raise UserError(
            f"--data {options.source}: none of the {len(kept)} clients has a training row; check the split column, "
            "--data.images-per-client, --data.validation-share and --data.test-share."
        )
    description = {
        **federation.description,
        "left_out": out,
        "rows": {client.name: {split: len(client.rows_of(split)) for split in SPLITS} for client in kept},
    }
    return Federation(kept, description, federation.skipped)


def _read_splits(table: Table) -> list[str | None]:
    splits = table.read_text("split")
    unknown = Counter(repr(split) for split in splits if split not in SPLITS)
    if unknown:
        listed = ", ".join(f"{value} ({count} rows)" for value, count in unknown.most_common(5))
        raise UserError(
            f"{table.name}: column 'split' has {listed}; expected {', '.join(SPLITS)}. Rename them, or leave the "
            "column out to have rows split by image content."
        )
    return splits


def _draw_splits(
    table: Table, rows_of: dict[str, list[int]], options: "DataOptions", seed: int
) -> dict[int, str | None]:
    """Split every client's images by their rank in a seeded order; an image belongs to its first client by name.

    The order is a keyed hash of the content, so rows may be added or reordered and the other images keep their ranks.
    """
    key = int(seed).to_bytes(16, "little")
    split_of_image: dict[bytes, str] = {}
    split_of_row: dict[int, str | None] = {}
    for _, rows in sorted(rows_of.items()):
        digests, _ = digest_rows(table, rows)
        new = {digest for digest in digests if digest is not None and digest not in split_of_image}
        ranked = sorted(new, key=lambda digest: hashlib.blake2b(digest, key=key, digest_size=16).digest())
        test, validation = _round(options.test_share * len(new)), _round(options.validation_share * len(new))
        for rank, digest in enumerate(ranked):
            split_of_image[digest] = "test" if rank < test else "validation" if rank < test + validation else "train"
        for row, digest in zip(rows, digests, strict=True):
            split_of_row[row] = "train" if digest is None else split_of_image[digest]  # the former are skipped later
    return split_of_row


def _round(value: float) -> int:
    return int(np.floor(value + 0.5))


def _read_idx(table: Table, row: int) -> str | None:
    return table.read_text("idx", [row])[0] if "idx" in table.columns else None


def count_reasons(skipped: Sequence[Skipped]) -> dict[str, int]:
    """Reason -> number of rows, the most frequent first."""
    return dict(Counter(entry.reason for entry in skipped).most_common())
