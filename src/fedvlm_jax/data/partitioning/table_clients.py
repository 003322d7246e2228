"""Clients out of a table: which rows are used, whose they are, and which split each is in.

Natural clients are the values of a key: column `client`, else `origin_dataset`, else what `--data.partition-by` says.
Their rows stay as the data have them. Other partitions draw clients over pictures. A table without a column `split` is
split inside every client, by the content of the images, so that no image is in two splits, not even with different
clients.
"""

import unicodedata
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, DataOptions, Dirichlet, Drawn, Natural, Pathological, Quantity
from fedvlm_jax.data.federated_dataset import Federation, gather_clients
from fedvlm_jax.data.partitioning import algorithms
from fedvlm_jax.data.partitioning import split_by_image as by_image
from fedvlm_jax.data.partitioning.row_keys import UNKNOWN, list_keys, read_key
from fedvlm_jax.data.skipped_rows import describe_skipped, skip_rows
from fedvlm_jax.data.sources import parquet
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.random_streams import Stream

DRAWS = 100  # how often a partition is drawn before its least size is given up
SHOWN = 40  # characters of a value that a message shows


def federate_by_column(table: Table, options: parquet.Options, seed: int) -> Federation:
    """Choose rows, give each to a client, and split every client's rows.

    Raises:
        UserError: as `choose_rows` and `federate_rows`, or the split column has values other than train, validation,
            test.
    """
    rows = choose_rows(table, options, seed)
    splits = _read_splits(table, rows) if "split" in table.columns else None
    shares = f"{options.validation_share:g} validation, {options.test_share:g} test"
    return federate_rows(table, rows, splits, options, seed).note(
        splits_from=f"drawn by image content: {shares}" if splits is None else "column 'split'",
        rows_chosen={"of": len(table), "origins": list(options.origins), "limit": options.limit, "are": len(rows)},
    )


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


def _read_splits(table: Table, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    splits = table.read_text("split", rows)
    unknown = Counter(repr(split and split[:SHOWN]) for split in splits if split not in SPLITS)
    if unknown:
        listed = ", ".join(f"{value} ({count} rows)" for value, count in unknown.most_common(5))
        raise UserError(
            f"{table.name}: column 'split' has {listed}; expected {', '.join(SPLITS)}. Rename them, or leave the "
            "column out to have rows split by image content."
        )
    return np.asarray([SPLITS.index(split) for split in splits], np.int64)


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
        UserError: nothing says who the clients are, there is no such key, there are fewer images than clients, or no
            draw has what the options ask for.
    """
    if isinstance(options.partition, Drawn):
        return _draw_clients(table, rows, splits, options, options.partition, seed)
    assert isinstance(options.partition, Natural)
    key = options.partition.by or _find_natural_key(table, rows)
    values = read_key(table, key, rows)
    kept = np.asarray([value is not None for value in values], bool)
    skipped = skip_rows(table, rows[~kept], [f"no {key}"] * int((~kept).sum()))
    names, owners = np.unique(np.asarray(values, object)[kept], return_inverse=True)
    rows = rows[kept]
    if splits is None:
        groups = by_image.group_by_image(table, rows)
        rows, owners, skipped = rows[groups.kept], owners[groups.kept], skipped + groups.skipped
        first = np.full(len(groups), len(names))
        np.minimum.at(first, groups.of_row, owners)  # a picture at two clients is split as the first of them has it
        splits = by_image.split_groups(first, by_image.rank_groups(groups, seed), options)[groups.of_row]
    else:
        splits = splits[kept]
    origin = f"column {key!r}" if key in table.columns else f"key {key!r}"
    about = {"kind": "natural", "by": key, "seed": seed}
    return gather_clients(rows, owners, splits, tuple(names.tolist()), skipped, clients_from=origin, partition=about)


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


def _draw_clients(
    table: Table,
    rows: Int[np.ndarray, " rows"],
    splits: Int[np.ndarray, " rows"] | None,
    options: DataOptions,
    partition: Drawn,
    seed: int,
) -> Federation:
    """Share the images of some rows out among clients.

    A least size makes the draw conditional, as in Li et al. (arXiv 2102.02079): draws with a smaller client are
    dropped.
    """
    count, wanted = partition.clients, options.min_examples
    groups = by_image.group_by_image(table, rows)
    rows, splits = rows[groups.kept], None if splits is None else splits[groups.kept]
    left_out = describe_skipped(table, groups.skipped)
    if len(groups) < count:
        raise UserError(
            f"--data.clients is {count}, and there are {len(groups)} images to share out. "
            f"{left_out}{'Choose fewer clients.' if len(groups) else ''}".rstrip()
        )
    labels, about = _read_labels(table, rows, groups, partition)
    order, rank = by_image.order_groups(groups, labels, splits, seed), by_image.rank_groups(groups, seed)
    best, train = -1, 0
    for attempt in range(DRAWS):
        rng = np.random.default_rng([Stream.PARTITIONS, seed, attempt])
        owner = np.empty(len(groups), np.int64)
        owner[order] = _cut(labels[order], partition, rng)
        split = by_image.split_groups(owner, rank, options)[groups.of_row] if splits is None else splits
        owners = owner[groups.of_row]
        training = split == by_image.TRAIN
        least = int(np.bincount(owners[training], minlength=count).min())
        if least >= wanted:
            about = {"kind": partition.kind, "clients": count, **about, "seed": seed}
            about |= {"min_examples": wanted, "draws": attempt + 1}
            width = len(str(count - 1))  # so that the names' order is that of the numbers
            names = tuple(f"client-{number:0{width}d}" for number in range(count))
            origin = f"partition {partition.kind}"
            return gather_clients(rows, owners, split, names, groups.skipped, clients_from=origin, partition=about)
        best, train = max(best, least), int(training.sum())
    larger = ", or for a larger --data.alpha" if "alpha" in about else ""
    raise UserError(
        f"--data.min-examples is {wanted}, and in {DRAWS} draws of --data.partition {partition.kind} the smallest of "
        f"{count} clients had {best} training rows at best; shared out evenly, {train} rows are {train // count} each. "
        f"Ask for less, for fewer --data.clients{larger}. {left_out}".rstrip()
    )


def _read_labels(
    table: Table, rows: Int[np.ndarray, " rows"], groups: by_image.ImageGroups, partition: Drawn
) -> tuple[Int[np.ndarray, " groups"], dict[str, Any]]:
    """Read the groups' labels, zeros where the partition needs none, and describe the partition."""
    about: dict[str, Any] = {}
    if isinstance(partition, Dirichlet | Quantity):
        about["alpha"] = partition.alpha if np.isfinite(partition.alpha) else "inf"
    if isinstance(partition, Pathological):
        about["classes_per_client"] = partition.classes_per_client
    if not isinstance(partition, Dirichlet | Pathological):
        return np.zeros(len(groups), np.int64), about
    key = partition.by or "origin_dataset"
    if key not in list_keys(table) and partition.by is None:
        raise UserError(
            f"--data.partition {partition.kind} needs a key in which clients differ, and {table.name} has no column "
            f"{key!r}; name one with --data.partition-by: {', '.join(list_keys(table))}."
        )
    values = [value or UNKNOWN for value in read_key(table, key, rows)]
    names, numbers = np.unique(np.asarray(values, object), return_inverse=True)
    about = {"by": key, **about, "values": len(names), "rows_unknown": values.count(UNKNOWN)}
    return by_image.label_groups(groups, numbers), about


def _cut(labels: Int[np.ndarray, " groups"], partition: Drawn, rng: np.random.Generator) -> Int[np.ndarray, " groups"]:
    match partition:
        case Dirichlet():
            return algorithms.cut_dirichlet(labels, partition.clients, partition.alpha, rng)
        case Pathological():
            return algorithms.cut_pathological(labels, partition.clients, partition.classes_per_client, rng)
        case Quantity():
            return algorithms.cut_quantity(len(labels), partition.clients, partition.alpha, rng)
        case _:
            return algorithms.cut_iid(len(labels), partition.clients)
