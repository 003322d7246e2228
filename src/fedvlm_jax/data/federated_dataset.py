"""A federation: whose rows are whose, which of them train, validate and test, and which are left out, and why."""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, DataOptions, Split
from fedvlm_jax.data.image_decoding import BrokenImageError
from fedvlm_jax.data.table import LOST, OUTSIDE, Table
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.records.conversations import UNREADABLE

Rows = Int[np.ndarray, " rows"]  # int64, row numbers of a table or values of these rows


TOO_LONG = "prompt too long"  # why a row is skipped


@dataclass(frozen=True)
class Skipped:
    """A row that is not used, and why."""

    row: int
    idx: str | None  # the data set's name for it, where it has one
    reason: str


@dataclass(frozen=True, eq=False)
class ClientRows:
    """Rows of one client [n] int64, each in the order in which it is to be read; any of the three may be empty."""

    name: str  # stable over runs, unique in a federation
    train: Rows
    validation: Rows
    test: Rows
    # The client never trains, so `train` is empty; it serves to try models on a newcomer. Its training rows are not
    # tested on either, because other clients may have trained on the same pictures.
    held_out: bool = field(default=False, kw_only=True)

    @property
    def trains(self) -> bool:
        """Say whether the client takes part in rounds: it is not held out and has training rows."""
        return not self.held_out and len(self.train) > 0

    def rows_of(self, split: Split) -> Rows:
        """Return the rows of a split by its name."""
        return getattr(self, split)


@dataclass(frozen=True, eq=False)
class Federation:
    """All clients, in the order that gives them their numbers.

    The description is JSON: how it was made (the partition with its key, concentration and seed) and what came out
    (held-out clients, counts per client and, where topics were drawn, the realised mix).
    """

    clients: tuple[ClientRows, ...]  # sorted so that the same options give the same order everywhere
    description: dict[str, Any]
    skipped: tuple[Skipped, ...] = field(default=())  # rows without a client

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names, in order."""
        return tuple(client.name for client in self.clients)

    @property
    def rows(self) -> Rows:
        """Every row in use: client by client, train, validation, test."""
        parts = [client.rows_of(split) for client in self.clients for split in SPLITS]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def note(self, **facts: Any) -> "Federation":
        """Return it with more facts in its description.

        >>> Federation((), {"partition": "iid"}).note(left_out=[]).description
        {'partition': 'iid', 'left_out': []}
        """
        return dataclasses.replace(self, description={**self.description, **facts})


def gather_clients(
    rows: Rows, owners: Rows, splits: Rows, names: tuple[str, ...], skipped: tuple[Skipped, ...], **description: Any
) -> Federation:
    """Give every client its rows, split by split; a client without rows stays, empty.

    `rows` [n] are in the order in which clients are to read them; `owners` are places in `names`, `splits` in `SPLITS`.

    >>> rows, owners, splits = np.asarray([7, 3, 5]), np.asarray([1, 0, 1]), np.asarray([0, 0, 2])
    >>> ann, bob = gather_clients(rows, owners, splits, ("ann", "bob"), ()).clients
    >>> ann.train, bob.train, bob.test
    (array([3]), array([7]), array([5]))
    """
    part = owners * len(SPLITS) + splits
    order = np.argsort(part, kind="stable")  # stable: rows keep the order in which clients read them
    edges = np.searchsorted(part[order], np.arange(len(names) * len(SPLITS) + 1))
    parts = [rows[order[start:end]].astype(np.int64) for start, end in itertools.pairwise(edges)]
    clients = (ClientRows(name, *parts[3 * place : 3 * place + 3]) for place, name in enumerate(names))
    return Federation(tuple(clients), description, skipped)


def federate(table: Table, options: DataOptions, seed: int) -> Federation:
    """Cut a table into clients, as its source does it; clients that are too small are left out, some are held out.

    Raises:
        UserError: nothing says who the clients are, the partition cannot be, or there is nothing to train on.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; expected an integer from 0 to {2**63 - 1}.")
    federation = options.federate(table, seed)
    if table.revision:
        federation = federation.note(revision=table.revision)
    if options.novel_classes > 0:
        federation = _hold_out_classes(federation, table, options.novel_classes, seed)
    sizes = [len(client.train) for client in federation.clients]
    kept = tuple(client for client in federation.clients if len(client.train) >= options.min_examples)
    if not kept:
        raise UserError(
            f"--data {options.source}: no client is left of {len(sizes)}; --data.min-examples is "
            f"{options.min_examples} and the largest client has {format_count(max(sizes, default=0), 'training row')}. "
            f"{describe_skipped(table, federation.skipped)}".rstrip()
        )
    out = [client.name for client in federation.clients if len(client.train) < options.min_examples]
    federation = dataclasses.replace(federation, clients=kept).note(left_out=out)
    if options.held_out_clients > 0:
        federation = _hold_out(federation, options.held_out_clients, seed)
    return check_federation(table, federation, options)


def _hold_out(federation: Federation, share: float, seed: int) -> Federation:
    """Take a share of the clients out of training, chosen by the seed and their names alone."""
    count = max(1, int(np.floor(share * len(federation.clients) + 0.5)))
    if count >= len(federation.clients):
        raise UserError(
            f"--data.held-out-clients {share:g} of {format_count(len(federation.clients), 'client')} is "
            f"{count}: nobody would be left "
            "to train. Hold out fewer, or make more clients."
        )
    names = federation.names
    first = sort_by_hash([name.encode() for name in names], seed, b"held out")[:count]
    chosen = {names[place] for place in first}
    unused, clients = 0, list(federation.clients)
    for place, client in enumerate(clients):
        if client.name in chosen:
            unused += len(client.train)
            clients[place] = dataclasses.replace(client, train=np.empty(0, np.int64), held_out=True)
    held_out = {"share": share, "seed": seed, "clients": sorted(chosen), "training_rows_set_aside": unused}
    return dataclasses.replace(federation, clients=tuple(clients)).note(held_out=held_out)


def _hold_out_classes(federation: Federation, table: Table, share: float, seed: int) -> Federation:
    """Take a share of the different answers out of training and validation, by the seed and their texts alone."""
    texts = dict(zip(federation.rows.tolist(), table.read_stripped("chosen", federation.rows), strict=True))
    names = sorted(set(texts.values()) - {"", UNREADABLE})
    count = max(1, int(np.floor(share * len(names) + 0.5)))
    if count >= len(names):
        raise UserError(
            f"--data.novel-classes {share:g} of {format_count(len(names), 'different answer')} is {count}: none would "
            "be left to train on"
        )
    chosen = {names[place] for place in sort_by_hash([name.encode() for name in names], seed, b"novel classes")[:count]}

    def keep(rows: Rows) -> Rows:
        return rows[np.asarray([texts[row] not in chosen for row in rows.tolist()], bool)]

    clients = tuple(
        dataclasses.replace(client, train=keep(client.train), validation=keep(client.validation))
        for client in federation.clients
    )
    after = dataclasses.replace(federation, clients=clients)
    aside = len(federation.rows) - len(after.rows)
    return after.note(novel_classes={"share": share, "seed": seed, "classes": len(chosen), "rows_set_aside": aside})


def check_federation(table: Table, federation: Federation, options: DataOptions) -> Federation:
    """Describe who has what, and refuse names that are not unique or not UTF-8, and clients without training rows.

    Raises:
        UserError: two clients have one name, a name is not text that can be written, or none of the clients has a
            training row.
    """
    # Models, results and files of adapters are found by names.
    if twice := [name for name, count in Counter(federation.names).items() if count > 1]:
        raise UserError(
            f"--data {options.source}: two clients are called {twice[0]!r}; give every client its own name."
        )
    for name in federation.names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"--data {options.source}: the client name {name!r} cannot be written as UTF-8.") from None
    if not any(len(client.train) for client in federation.clients):
        raise UserError(
            f"--data {options.source}: none of the {format_count(len(federation.clients), 'client')} has "
            "a training row. "
            f"{describe_skipped(table, federation.skipped)}Check the split column, --data.images-per-client, "
            "--data.validation-share and --data.test-share."
        )
    rows = {client.name: {split: len(client.rows_of(split)) for split in SPLITS} for client in federation.clients}
    return federation.note(rows=rows)


def sort_by_hash(contents: Sequence[bytes], seed: int, purpose: bytes) -> list[int]:
    """Sort places by a keyed hash of their contents, so that the order of two does not depend on the others.

    >>> sort_by_hash([b"ann", b"bob", b"eve"], 0, b"held out")
    [2, 1, 0]
    """
    key = int(seed).to_bytes(16, "little")
    hashed = [hashlib.blake2b(content, key=key, person=purpose, digest_size=16).digest() for content in contents]
    return sorted(range(len(contents)), key=hashed.__getitem__)


def skip_rows(table: Table, rows: Rows, reasons: Sequence[str]) -> tuple[Skipped, ...]:
    """Pair each of these rows with its reason."""
    idx = table.read_text("idx", rows) if "idx" in table.columns else [None] * len(rows)
    return tuple(Skipped(int(row), name, reason) for row, name, reason in zip(rows, idx, reasons, strict=True))


def count_reasons(skipped: Sequence[Skipped]) -> dict[str, int]:
    """Count the rows of every reason, the most frequent first."""
    return dict(Counter(entry.reason for entry in skipped).most_common())


def list_reasons(skipped: Sequence[Skipped]) -> str:
    """List how many rows have which reason: "2 × no image, 1 × empty answer"."""
    return ", ".join(f"{count} × {reason}" for reason, count in count_reasons(skipped).items())


def find_text_fault(question: str, chosen: str) -> str | None:
    """Say why nothing can be learnt from a row's question and answer (without spaces around them), if so.

    >>> find_text_fault("What is this?", "")
    'empty answer'
    """
    return _find_fault("question", question) or _find_fault("answer", chosen)


def find_pair_fault(chosen: str, rejected: str) -> str | None:
    """Say why two answers (without spaces around them) state no preference, if so.

    >>> find_pair_fault("a cat", "a cat")
    'chosen equals rejected'
    """
    return _find_fault("rejected answer", rejected) or ("chosen equals rejected" if chosen == rejected else None)


def _find_fault(name: str, text: str) -> str | None:
    if not text:
        return f"empty {name}"
    return f"{name} is not UTF-8" if text == UNREADABLE else None


def describe_skipped(table: Table, skipped: Sequence[Skipped]) -> str:
    """Say how many rows are left out and why, with what was looked for where a file was: sentences, or nothing."""
    return f"Rows left out: {list_reasons(skipped)}. {describe_lost(table, skipped)}" if skipped else ""


def describe_lost(table: Table, skipped: Sequence[Skipped]) -> str:
    """Say of the first image file that was not read what was looked for and where: a sentence, or nothing."""
    for entry in skipped:
        if entry.reason in (LOST, OUTSIDE) and (lookup := _describe_lost_picture(table, entry)):
            return f"For row {entry.row} it {lookup}. "
    return ""


def _describe_lost_picture(table: Table, entry: Skipped) -> str:
    """Say what was looked for where the row has the image that its reason is about."""
    (count,) = table.count_pictures([entry.row]).tolist()
    for place in range(count - 1):
        try:
            table.read_image(entry.row, place)
        except BrokenImageError:
            return table.describe_lookup(entry.row, place)
    return table.describe_lookup(entry.row, count - 1)


def check_share(table: Table, skipped: tuple[Skipped, ...], total: int, options: DataOptions) -> None:
    """Refuse data of which more of the `total` rows cannot be used than the options allow.

    Raises:
        UserError: with the reasons, and the first rows.
    """
    if len(skipped) > options.max_bad_share * total:
        counted, lost = list_reasons(skipped), describe_lost(table, skipped)
        shown = "; ".join(f"row {s.row}{f' (idx {s.idx})' if s.idx else ''}: {s.reason}" for s in skipped[:5])
        if any(entry.reason == TOO_LONG for entry in skipped):
            lost += (
                f"Prompts have at most {format_count(options.max_prompt_tokens, 'token')}, those of their "
                "pictures among them: "
            )
            lost += "--data.max-prompt-tokens says so, or the model's positions, of which a decoder-only model keeps "
            lost += f"some for answers (--data.max-answer-tokens {options.max_answer_tokens}). "
        raise UserError(
            f"{table.name}: {len(skipped)} of {format_count(total, 'row')} cannot be used ({counted}), "
            "more than --data.max-bad-share "
            f"{options.max_bad_share:g} allows. The first are {shown}. {lost}Mend them, or raise the share."
        )
    if len(skipped) == total:
        raise UserError(f"{table.name}: none of the {format_count(total, 'row')} can be used.")
