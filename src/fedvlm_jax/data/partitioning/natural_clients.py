"""Clients out of a table's columns: which rows are used, whose they are, and which split each is in.

Natural clients are the values of a key: column `client`, else `origin_dataset`, else what `--data.partition-by` says.
Their rows stay as the data have them. A source without a `split` column is split inside every client, by the content of
the images, so that no image is in two splits, not even with different clients.
"""

import unicodedata
from collections import Counter

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, DataOptions, Natural
from fedvlm_jax.data.federated_dataset import Federation, gather_clients
from fedvlm_jax.data.partitioning.drawn_clients import draw_clients
from fedvlm_jax.data.partitioning.row_keys import list_keys, read_key
from fedvlm_jax.data.partitioning.split_by_image import group_by_image, rank_groups, split_groups
from fedvlm_jax.data.skipped_rows import skip_rows
from fedvlm_jax.data.sources import parquet
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.random_streams import Stream

SHOWN = 40  # characters of a value that a message shows


def federate_by_column(table: Table, options: parquet.Options, seed: int) -> Federation:
    """Choose rows, give each to a client, and split every client's rows.

    Raises:
        UserError: as `choose_rows` and `federate_rows`, or the split column has values other than train, validation,
            test.
    """
    rows = choose_rows(table, options, seed)
    splits = _read_splits(table, rows) if "split" in table.columns else None
    federation = federate_rows(table, rows, splits, options, seed)
    shares = f"{options.validation_share:g} validation, {options.test_share:g} test"
    description = {
        **federation.description,
        "splits_from": f"drawn by image content: {shares}" if splits is None else "column 'split'",
        "rows_chosen": {"of": len(table), "origins": list(options.origins), "limit": options.limit, "are": len(rows)},
    }
    return Federation(federation.clients, description, federation.skipped)


def choose_rows(table: Table, options: parquet.Options, seed: int) -> Int[np.ndarray, " rows"]:
    """Return the rows in use, ascending: those of the chosen origins, and of them as many as the limit allows.

    A limit of N cuts the rows into N stretches of equal length and draws one row of each. So the choice is even over
    the files, and no period in them can show (as it would if every k-th row were taken).

    Raises:
        UserError: an origin that the table does not have, or it has no such column.
    """
    rows = np.arange(len(table))
    if options.origins:
        found = read_key(table, "origin_dataset")
        counts = Counter(origin for origin in found if origin)
        wanted = {unicodedata.normalize("NFC", origin.strip()) for origin in options.origins}
        unknown = sorted(wanted - set(counts))
        if unknown:
            known = ", ".join(f"{origin} ({count} rows)" for origin, count in sorted(counts.items()))
            raise UserError(f"--data.origins has {', '.join(unknown)}; {table.name} has {known or 'none'}.")
        rows = rows[[origin in wanted for origin in found]]
    if options.limit is not None and options.limit < len(rows):
        edges = np.arange(options.limit + 1) * len(rows) // options.limit
        rows = rows[np.random.default_rng([Stream.LIMIT, seed]).integers(edges[:-1], edges[1:])]
    return rows


def federate_rows(
    table: Table,
    rows: Int[np.ndarray, " rows"],
    splits: Int[np.ndarray, " rows"] | None,
    options: DataOptions,
    seed: int,
) -> Federation:
    """Give rows to clients as `options.partition` says.

    Args:
        table: the table of the rows.
        rows: [N] row numbers, in the order in which clients are to read them.
        splits: [N] places in `SPLITS`; drawn by image content where None.
        options: the partition and the shares of the splits.
        seed: of the draws.

    Raises:
        UserError: nothing says who the clients are, or no partition has what the options ask for.
    """
    make = _read_clients if isinstance(options.partition, Natural) else draw_clients
    return make(table, rows, splits, options, seed)


def _read_clients(
    table: Table,
    rows: Int[np.ndarray, " rows"],
    splits: Int[np.ndarray, " rows"] | None,
    options: DataOptions,
    seed: int,
) -> Federation:
    assert isinstance(options.partition, Natural)
    key = options.partition.by or _find_natural_key(table, rows)
    values = read_key(table, key, rows)
    kept = np.asarray([value is not None for value in values], bool)
    skipped = skip_rows(table, rows[~kept], [f"no {key}"] * int((~kept).sum()))
    names = sorted({value for value in values if value is not None})
    place = {name: number for number, name in enumerate(names)}
    owners = np.asarray([place[value] for value in values if value is not None], np.int64)
    rows = rows[kept]
    if splits is None:
        groups = group_by_image(table, rows)
        rows, owners, skipped = rows[groups.kept], owners[groups.kept], skipped + groups.skipped
        first = np.full(len(groups), len(names))
        np.minimum.at(first, groups.of_row, owners)  # a picture at two clients is split as the first of them has it
        splits = split_groups(first, rank_groups(groups, seed), options)[groups.of_row]
    else:
        splits = splits[kept]
    origin = f"column {key!r}" if key in table.columns else f"key {key!r}"
    about = {"clients_from": origin, "partition": {"kind": "natural", "by": key, "seed": seed}}
    return gather_clients(rows, owners, splits, names=tuple(names), skipped=skipped, description=about)


def _find_natural_key(table: Table, rows: Int[np.ndarray, " rows"]) -> str:
    if "client" in table.columns:
        return "client"
    if "origin_dataset" in table.columns:
        origins = {origin for origin in read_key(table, "origin_dataset", rows) if origin}
        if len(origins) >= 2:
            return "origin_dataset"
        seen = f"only {origins.pop()!r}" if origins else "nothing"
        lack = f"no column 'client', and {seen} in 'origin_dataset'"
    else:
        lack = "no column 'client' nor 'origin_dataset'"
    raise UserError(
        f"{table.name} does not say whose rows are whose: it has {lack}. Say what makes its clients with "
        f"--data.partition-by ({', '.join(list_keys(table))}), add a text column 'client', or cut it anew with "
        "--data.partition iid, dirichlet, pathological or quantity, and --data.clients."
    )


def _read_splits(table: Table, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    splits = table.read_text("split", rows)
    unknown = Counter(repr(split and split[:SHOWN]) for split in splits if split not in SPLITS)
    if unknown:
        listed = ", ".join(f"{value} ({count} rows)" for value, count in unknown.most_common(5))
        raise UserError(
            f"{table.name}: column 'split' has {listed}; expected {', '.join(SPLITS)}. Rename them, or leave the "
            "column out to have rows split by image content."
        )
    place = {str(name): number for number, name in enumerate(SPLITS)}
    return np.asarray([place[str(split)] for split in splits], np.int64)
