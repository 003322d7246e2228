"""Clients that are drawn: a partition over pictures, with the labels that it needs and the least size asked for.

A least size makes the draw conditional, as in Li et al. (arXiv 2102.02079): draws with a smaller client are dropped.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import DataOptions, Dirichlet, Drawn, Pathological, Quantity
from fedvlm_jax.data.federated_dataset import Federation, gather_clients
from fedvlm_jax.data.partitioning.algorithms import cut_dirichlet, cut_iid, cut_pathological, cut_quantity
from fedvlm_jax.data.partitioning.row_keys import UNKNOWN, list_keys, read_key
from fedvlm_jax.data.partitioning.split_by_image import (
    TRAIN,
    ImageGroups,
    group_by_image,
    label_groups,
    order_groups,
    rank_groups,
    split_groups,
)
from fedvlm_jax.data.skipped_rows import describe_skipped
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.random_streams import Stream

DRAWS = 100  # how often a partition is drawn before its least size is given up


def draw_clients(
    table: Table,
    rows: Int[np.ndarray, " rows"],
    splits: Int[np.ndarray, " rows"] | None,
    options: DataOptions,
    seed: int,
) -> Federation:
    """Share the images of some rows out among clients, after `options.partition`.

    Args:
        table: the table of the rows.
        rows: [N] row numbers.
        splits: [N] places in `SPLITS`; drawn inside every client where None.
        options: the partition, its key and concentration, and the least number of training rows.
        seed: of the draws.

    Raises:
        UserError: there are fewer images than clients, no such key, or no draw has what is asked for.
    """
    partition = options.partition
    assert isinstance(partition, Drawn)
    count = partition.clients
    groups = group_by_image(table, rows)
    rows, splits = rows[groups.kept], None if splits is None else splits[groups.kept]
    if len(groups) < count:
        raise UserError(
            f"--data.clients is {count}, and there are {len(groups)} images to share out. "
            f"{describe_skipped(table, groups.skipped)}{'Choose fewer clients.' if len(groups) else ''}".rstrip()
        )
    labels, about = _read_labels(table, rows, groups, partition)
    order, rank = order_groups(groups, labels, splits, seed), rank_groups(groups, seed)
    best, train = -1, 0
    for attempt in range(DRAWS):
        owner = np.empty(len(groups), np.int64)
        owner[order] = _cut(labels[order], partition, np.random.default_rng([Stream.PARTITIONS, seed, attempt]))
        split = split_groups(owner, rank, options)[groups.of_row] if splits is None else splits
        owners = owner[groups.of_row]
        training = split == TRAIN
        least = int(np.bincount(owners[training], minlength=count).min())
        if least >= options.min_examples:
            described = {"kind": partition.kind, "clients": count, **about, "seed": seed}
            described |= {"min_examples": options.min_examples, "draws": attempt + 1}
            made = {"clients_from": f"partition {partition.kind}", "partition": described}
            width = len(str(count - 1))  # so that the names' order is that of the numbers
            names = tuple(f"client-{number:0{width}d}" for number in range(count))
            return gather_clients(rows, owners, split, names=names, skipped=groups.skipped, description=made)
        best, train = max(best, least), int(training.sum())
    larger = ", or for a larger --data.alpha" if "alpha" in about else ""
    raise UserError(
        f"--data.min-examples is {options.min_examples}, and in {DRAWS} draws of --data.partition {partition.kind} "
        f"the smallest of {count} clients had {best} training rows at best; shared out evenly, {train} "
        f"rows are {train // count} each. Ask for less, for fewer --data.clients{larger}. "
        f"{describe_skipped(table, groups.skipped)}".rstrip()
    )


def _read_labels(
    table: Table, rows: Int[np.ndarray, " rows"], groups: ImageGroups, partition: Drawn
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
    place = {name: number for number, name in enumerate(sorted(set(values)))}
    labels = label_groups(groups, np.asarray([place[value] for value in values], np.int64))
    return labels, {"by": key, **about, "values": len(place), "rows_unknown": values.count(UNKNOWN)}


def _cut(labels: Int[np.ndarray, " groups"], partition: Drawn, rng: np.random.Generator) -> Int[np.ndarray, " groups"]:
    match partition:
        case Dirichlet():
            return cut_dirichlet(labels, partition.clients, partition.alpha, rng)
        case Pathological():
            return cut_pathological(labels, partition.clients, partition.classes_per_client, rng)
        case Quantity():
            return cut_quantity(len(labels), partition.clients, partition.alpha, rng)
        case _:
            return cut_iid(len(labels), partition.clients)
