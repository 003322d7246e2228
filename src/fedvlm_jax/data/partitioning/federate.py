"""One table cut into clients, which are then checked; clients that are too small are left out, some are held out.

A held-out client keeps its validation and test rows; its training rows are set aside, not tested on, because other
clients may have trained on the same pictures.
"""

import dataclasses
import hashlib
from collections import Counter

import numpy as np

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.federated_dataset import Federation
from fedvlm_jax.data.partitioning.table_clients import federate_by_column
from fedvlm_jax.data.skipped_rows import describe_skipped
from fedvlm_jax.data.sources import parquet
from fedvlm_jax.data.sources.registry import find_sets
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError


def federate(table: Table, options: DataOptions, seed: int) -> Federation:
    """Cut a table into clients, as its data set does it, or by its columns.

    Args:
        table: from `read_table(options)`.
        options: of the data.
        seed: a non-negative integer; the same seed gives the same federation everywhere.

    Raises:
        UserError: nothing says who the clients are, a partition that cannot be, an unknown split, no clients, nothing
            to train on, or a negative seed.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; expected an integer from 0 to {2**63 - 1}.")
    named = find_sets().get(table.name)
    if named is not None and named.federate is not None:
        federation = named.federate(table, options, seed)
    else:
        assert isinstance(options, parquet.Options)
        federation = federate_by_column(table, options, seed)
    if table.revision:
        federation = federation.note(revision=table.revision)
    federation = _leave_out(table, federation, options)
    if options.held_out_clients > 0:
        federation = _hold_out(federation, options.held_out_clients, seed)
    return check_federation(table, federation, options)


def _leave_out(table: Table, federation: Federation, options: DataOptions) -> Federation:
    sizes = [len(client.train) for client in federation.clients]
    kept = tuple(client for client in federation.clients if len(client.train) >= options.min_examples)
    if not kept:
        raise UserError(
            f"--data {options.source}: no client is left of {len(sizes)}; --data.min-examples is "
            f"{options.min_examples} and the largest client has {max(sizes, default=0)} training rows. "
            f"{describe_skipped(table, federation.skipped)}".rstrip()
        )
    out = [client.name for client in federation.clients if len(client.train) < options.min_examples]
    return dataclasses.replace(federation, clients=kept).note(left_out=out)


def _hold_out(federation: Federation, share: float, seed: int) -> Federation:
    """Take a share of the clients out of training, chosen by the seed and their names alone."""
    count = max(1, int(np.floor(share * len(federation.clients) + 0.5)))
    if count >= len(federation.clients):
        raise UserError(
            f"--data.held-out-clients {share:g} of {len(federation.clients)} clients is {count}: nobody would be left "
            "to train. Hold out fewer, or make more clients."
        )
    key = int(seed).to_bytes(16, "little")

    def hash_name(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), key=key, person=b"held out", digest_size=16).digest()

    # By a hash of the name, so that a client's fate does not depend on which others there are.
    chosen = sorted(sorted(federation.names, key=hash_name)[:count])
    unused, clients = 0, list(federation.clients)
    for place, client in enumerate(clients):
        if client.name in chosen:
            unused += len(client.train)
            clients[place] = dataclasses.replace(client, train=np.empty(0, np.int64), held_out=True)
    held_out = {"share": share, "seed": seed, "clients": chosen, "training_rows_set_aside": unused}
    return dataclasses.replace(federation, clients=tuple(clients)).note(held_out=held_out)


def check_federation(table: Table, federation: Federation, options: DataOptions) -> Federation:
    """Describe who has what, and refuse what cannot be trained on.

    Raises:
        UserError: two clients have one name, a name is not text that can be written, or none of the clients has a
            training row.
    """
    # Names must be unique and UTF-8: models, results and files of adapters are found by them.
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
            f"--data {options.source}: none of the {len(federation.clients)} clients has a training row. "
            f"{describe_skipped(table, federation.skipped)}Check the split column, --data.images-per-client, "
            "--data.validation-share and --data.test-share."
        )
    rows = {client.name: {split: len(client.rows_of(split)) for split in SPLITS} for client in federation.clients}
    return federation.note(rows=rows)
