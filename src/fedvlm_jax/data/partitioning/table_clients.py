"""Clients out of a table: which rows are used, whose they are, and which split each is in.

Natural clients are the values of a key: column `client`, else `origin_dataset`, else what `--data.partition-by` says.
Other partitions draw clients over pictures. A table without a column `split` is split inside every client, by the
content of the images, so that no image is in two splits, not even with different clients. Rows are grouped by the
pictures that they show, all that are linked by a common one together; groups are put in order by a keyed hash of a
picture's bytes, never by their place in the table: reordered files give the same order.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from fedvlm_jax.data import federated_dataset as federated
from fedvlm_jax.data.config import FAULT, SPLITS, DataOptions, Dirichlet, Drawn, Natural, Pathological, Quantity
from fedvlm_jax.data.federated_dataset import Federation, Rows, gather_clients
from fedvlm_jax.data.forms.base import RowOptions
from fedvlm_jax.data.partitioning import algorithms
from fedvlm_jax.data.partitioning.row_keys import UNKNOWN, list_keys, read_key
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.unique_images import digest_rows, number_distinct
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.utils.random_streams import Stream

TRAIN, VALIDATION, TEST = range(len(SPLITS))
Groups = Int[np.ndarray, " groups"]  # int64, a value of each group
DRAWS = 100  # how often a partition is drawn before its least size is given up
SHOWN = 40  # characters of a value that a message shows


class ImageGroups(NamedTuple):
    """The groups of N rows, n of which have all their images."""

    kept: Bool[np.ndarray, " rows"]  # [N] which rows have them
    of_row: Rows  # [n] the group of each of these
    digests: list[bytes]  # the groups' contents: the least digest of an image in each
    skipped: tuple[federated.Skipped, ...]  # the rows without an image


def group_by_image(table: Table, rows: Rows) -> ImageGroups:
    """Group rows by the content of their images; rows that share any are in one group, and so on from row to row."""
    digests, missing = digest_rows(table, rows)
    kept = np.asarray([bool(held) for held in digests], bool)
    first = _join(digests)
    distinct, numbers = number_distinct(first[held[0]] for held in digests if held)
    skipped = federated.skip_rows(table, rows[~kept], [missing[row] for row in rows[~kept].tolist()])
    return ImageGroups(kept, numbers, distinct, skipped)


def _join(rows: Sequence[Sequence[bytes]]) -> dict[bytes, bytes]:
    """Join what stands in one row: thing -> the least of all that are linked with it.

    >>> _join([(b"b", b"c"), (b"d",), (b"c", b"a")])
    {b'b': b'a', b'c': b'a', b'd': b'd', b'a': b'a'}
    """
    above = {thing: thing for row in rows for thing in row}

    def find(thing: bytes) -> bytes:
        while above[thing] != thing:
            above[thing] = thing = above[above[thing]]
        return thing

    for row in rows:
        for thing in row[1:]:
            least, other = sorted((find(row[0]), find(thing)))
            above[other] = least
    return {thing: find(thing) for thing in above}


def federate_by_column(table: Table, options: RowOptions, seed: int) -> Federation:
    """Choose rows, give each to a client, and split every client's rows.

    Raises:
        UserError: as `choose_rows` and `federate_rows`, or the split column has values other than train, validation,
            test.
    """
    rows = choose_rows(table, options, seed)
    rows, unusable = _leave_out_unusable(table, rows)
    splits = None
    if "split" in table.columns:
        names = table.read_text("split", rows)
        if unknown := Counter(repr(name and name[:SHOWN]) for name in names if name not in SPLITS):
            listed = ", ".join(f"{value} ({format_count(count, 'row')})" for value, count in unknown.most_common(5))
            raise UserError(
                f"{table.name}: column 'split' has {listed}; expected {', '.join(SPLITS)}. Rename them, or leave the "
                "column out to have rows split by image content."
            )
        splits = np.asarray([SPLITS.index(name) for name in names], np.int64)
    shares = f"{options.validation_share:g} validation, {options.test_share:g} test"
    federation = federate_rows(table, rows, splits, options, seed)
    return dataclasses.replace(federation, skipped=unusable + federation.skipped).note(
        splits_from=f"drawn by image content: {shares}" if splits is None else "column 'split'",
        rows_chosen={"of": len(table), "origins": list(options.origins), "limit": options.limit, "are": len(rows)},
    )


def _leave_out_unusable(table: Table, rows: Rows) -> tuple[Rows, tuple[federated.Skipped, ...]]:
    """Leave out rows whose records could not be read."""
    if FAULT not in table.columns:
        return rows, ()
    faults = table.read_text(FAULT, rows)
    bad = np.asarray([fault is not None for fault in faults], bool)
    return rows[~bad], federated.skip_rows(table, rows[bad], [fault for fault in faults if fault is not None])


def choose_rows(table: Table, options: RowOptions, seed: int) -> Rows:
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
        if unknown := sorted(wanted - set(counts)):
            known = ", ".join(f"{origin} ({format_count(count, 'row')})" for origin, count in sorted(counts.items()))
            raise UserError(f"--data.origins has {', '.join(unknown)}; {table.name} has {known or 'none'}.")
        rows = rows[[origin in wanted for origin in found]]
    if options.limit is not None and options.limit < len(rows):
        edges = np.arange(options.limit + 1) * len(rows) // options.limit
        rows = rows[np.random.default_rng([Stream.LIMIT, seed]).integers(edges[:-1], edges[1:])]
    return rows


def federate_rows(table: Table, rows: Rows, splits: Rows | None, options: DataOptions, seed: int) -> Federation:
    """Give rows [N], in the order in which they are to be read, to clients; splits that are None are drawn by image.

    Raises:
        UserError: nothing says who the clients are, or no partition has what the options ask for.
    """
    if isinstance(options.partition, Drawn):
        return _draw_clients(table, rows, splits, options, options.partition, seed)
    assert isinstance(options.partition, Natural)
    key = options.partition.by or _find_natural_key(table, rows)
    values = read_key(table, key, rows)
    kept = np.asarray([value is not None for value in values], bool)
    skipped = federated.skip_rows(table, rows[~kept], [f"no {key}"] * int((~kept).sum()))
    names, owners = np.unique(np.asarray(values, object)[kept], return_inverse=True)
    rows = rows[kept]
    if splits is None:
        groups = group_by_image(table, rows)
        rows, owners, skipped = rows[groups.kept], owners[groups.kept], skipped + groups.skipped
        first = np.full(len(groups.digests), len(names))
        np.minimum.at(first, groups.of_row, owners)  # a picture at two clients is split as the first of them has it
        splits = split_groups(first, rank_groups(groups, seed), options)[groups.of_row]
    else:
        splits = splits[kept]
    origin = f"column {key!r}" if key in table.columns else f"key {key!r}"
    about = {"kind": "natural", "by": key, "seed": seed}
    return gather_clients(rows, owners, splits, tuple(names.tolist()), skipped, clients_from=origin, partition=about)


def _find_natural_key(table: Table, rows: Rows) -> str:
    if "client" in table.columns:
        return "client"
    lack = "no column 'client' nor 'origin_dataset'"
    if "origin_dataset" in table.columns:
        origins = {origin for origin in read_key(table, "origin_dataset", rows) if origin}
        if len(origins) >= 2:
            return "origin_dataset"
        seen = f"only {origins.pop()!r}" if origins else "nothing"
        lack = f"no column 'client', and {seen} in 'origin_dataset'"
    raise UserError(
        f"{table.name} does not say whose rows are whose: it has {lack}. Say what makes its clients with "
        f"--data.partition-by ({', '.join(list_keys(table))}), add a text column 'client', take the "
        "pictures' folders with --data.client-folder, or cut it anew with --data.partition iid, dirichlet, "
        "pathological or quantity, and --data.clients."
    )


def _draw_clients(
    table: Table, rows: Rows, splits: Rows | None, options: DataOptions, partition: Drawn, seed: int
) -> Federation:
    """Share images out among clients; draws with one below the least size are dropped (Li et al., arXiv 2102.02079)."""
    count, wanted = partition.clients, options.min_examples
    groups = group_by_image(table, rows)
    rows, splits = rows[groups.kept], None if splits is None else splits[groups.kept]
    left_out = federated.describe_skipped(table, groups.skipped)
    if len(groups.digests) < count:
        things = "images" if table.most_pictures == 1 else "groups of rows without a common image"
        raise UserError(
            f"--data.clients is {count}, and there are {len(groups.digests)} {things} to share out. "
            f"{left_out}{'Choose fewer clients.' if len(groups.digests) else ''}".rstrip()
        )
    labels, about = _read_labels(table, rows, groups, partition)
    order, rank = order_groups(groups, labels, splits, seed), rank_groups(groups, seed)
    best, train = -1, 0
    for attempt in range(DRAWS):
        rng = np.random.default_rng([Stream.PARTITIONS, seed, attempt])
        owner = np.empty(len(groups.digests), np.int64)
        owner[order] = _cut(labels[order], partition, rng)
        split = split_groups(owner, rank, options)[groups.of_row] if splits is None else splits
        owners = owner[groups.of_row]
        training = split == TRAIN
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
        f"{format_count(count, 'client')} had {format_count(best, 'training row')} at best; shared out "
        f"evenly, {format_count(train, 'row is', 'rows are')} {train // count} each. "
        f"Ask for less, for fewer --data.clients{larger}. {left_out}".rstrip()
    )


def _read_labels(table: Table, rows: Rows, groups: ImageGroups, partition: Drawn) -> tuple[Groups, dict[str, Any]]:
    """Read every group's most frequent label (or the first of these; zeros if none are needed), with a description."""
    about: dict[str, Any] = {}
    if isinstance(partition, Dirichlet | Quantity):
        about["alpha"] = partition.alpha if np.isfinite(partition.alpha) else "inf"
    if isinstance(partition, Pathological):
        about["classes_per_client"] = partition.classes_per_client
    if not isinstance(partition, Dirichlet | Pathological):
        return np.zeros(len(groups.digests), np.int64), about
    key = partition.by or "origin_dataset"
    if key not in list_keys(table) and partition.by is None:
        raise UserError(
            f"--data.partition {partition.kind} needs a key in which clients differ, and {table.name} has no column "
            f"{key!r}; name one with --data.partition-by: {', '.join(list_keys(table))}."
        )
    values = [value or UNKNOWN for value in read_key(table, key, rows)]
    names, numbers = np.unique(np.asarray(values, object), return_inverse=True)
    about = {"by": key, **about, "values": len(names), "rows_unknown": values.count(UNKNOWN)}
    pairs, counts = np.unique(np.stack([groups.of_row, numbers]), axis=1, return_counts=True)
    # The last key sorts first: by group, then by falling count, then by label.
    by_count = np.lexsort((pairs[1], -counts, pairs[0]))
    _, first = np.unique(pairs[0][by_count], return_index=True)
    return pairs[1][by_count][first], about


def _cut(labels: Groups, partition: Drawn, rng: np.random.Generator) -> Groups:
    match partition:
        case Dirichlet():
            return algorithms.cut_dirichlet(labels, partition.clients, partition.alpha, rng)
        case Pathological():
            return algorithms.cut_pathological(labels, partition.clients, partition.classes_per_client, rng)
        case Quantity():
            return algorithms.cut_quantity(len(labels), partition.clients, partition.alpha, rng)
        case _:
            return algorithms.cut_iid(len(labels), partition.clients)


def rank_groups(groups: ImageGroups, seed: int, purpose: bytes = b"") -> Groups:
    """Rank groups by a hash of their content, the seed and the purpose alone."""
    rank = np.empty(len(groups.digests), np.int64)
    rank[federated.sort_by_hash(groups.digests, seed, purpose)] = np.arange(len(groups.digests))
    return rank


def order_groups(groups: ImageGroups, labels: Groups, splits: Rows | None, seed: int) -> Groups:
    """Draw the order in which clients take runs of groups, labels and given splits evenly mixed in every run."""
    strata = labels * len(SPLITS)
    if splits is not None:
        split = np.full(len(groups.digests), len(SPLITS) - 1)
        np.minimum.at(split, groups.of_row, splits)
        strata = strata + split
    # Another purpose than that of the splits, so that the two draws are independent.
    rank = rank_groups(groups, seed, b"partition")
    place, size = _count_off(strata, rank)
    return np.lexsort((rank, (place + 0.5) / size))


def split_groups(owners: Groups, rank: Groups, options: DataOptions) -> Groups:
    """Put every owner's first groups by rank into test, the next into validation, the others into train."""
    assert isinstance(options, RowOptions)  # a set of another form has splits already
    place, size = _count_off(owners, rank)
    test = np.floor(options.test_share * size + 0.5)
    validation = np.floor(options.validation_share * size + 0.5)
    return np.where(place < test, TEST, np.where(place < test + validation, VALIDATION, TRAIN))


def _count_off(strata: Groups, rank: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Return every group's place by rank in its stratum, and the size of that stratum."""
    order = np.lexsort((rank, strata))
    _, start, which, sizes = np.unique(strata[order], return_index=True, return_inverse=True, return_counts=True)
    place, size = np.empty(len(strata), np.int64), np.empty(len(strata), np.int64)
    place[order] = np.arange(len(strata)) - start[which]
    size[order] = sizes[which]
    return place, size
