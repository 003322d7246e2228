"""Several processes that run one program, each with separate devices (`jax.distributed`): order and waiting.

With one process nothing here does anything.

All processes do the same in the same order: every program over the devices of all, and every call of this module, must
be reached by each of them, or none goes on. What follows from that: whatever decides what comes next (a score, a
table, a place in a file) is known to all of them alike, and only reading examples and writing files is shared out.
"""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from fedvlm_jax.errors import UserError

PATIENCE = 7 * 24 * 3600 * 1000
"""Milliseconds that one waits for the others at most: that one of them is gone is noticed elsewhere, and soon."""

_numbers = itertools.count()  # a fresh key for every exchange; alike in all processes, for their calls are


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Tell whether this is the process that writes what is written once, and prints how far the run is."""
    return jax.process_index() == 0


def share_out(count_: int) -> Int[np.ndarray, " some"]:
    """Select this process's part of 0 … count - 1, where it does not matter which process has which.

    >>> share_out(3).tolist()
    [0, 1, 2]
    """
    return np.arange(jax.process_index(), count_, jax.process_count())


def gather(values: Shaped[np.ndarray, "some ..."], count_: int) -> Shaped[np.ndarray, "count ..."]:
    """Collect, in every process, the values that each made for its part of `share_out`."""
    if count() == 1:
        return values
    from jax.experimental import multihost_utils

    most = -(-count_ // count())
    padded = np.concatenate([values, np.zeros((most - len(values), *values.shape[1:]), values.dtype)])
    together = multihost_utils.process_allgather(padded)  # [processes, most, …]
    return np.moveaxis(together, 0, 1).reshape(-1, *values.shape[1:])[:count_]


def wait_for_all() -> None:
    """Go on when all have come here; what each wrote to a shared disk before, the others may read then."""
    if count() > 1:
        _client().wait_at_barrier(f"fedvlm/wait/{next(_numbers)}", PATIENCE)


def tell_all(decide: Callable[[], Any]) -> Any:
    """Give all processes what the first decides: JSON, or the `UserError` that it raises."""
    if count() == 1:
        return decide()
    key = f"fedvlm/tell/{next(_numbers)}"
    if is_first():
        try:
            answer = {"value": decide()}
        except UserError as error:
            answer = {"error": str(error)}
        _client().key_value_set(key, json.dumps(answer))
    # The first reads it, too, so that all have what JSON makes of it.
    answer = json.loads(_client().blocking_key_value_get(key, PATIENCE))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def smallest(value: int | None) -> int | None:
    """The smallest of what all of them know; None where they do not (all or none of them)."""
    if value is None or count() == 1:
        return value
    key = f"fedvlm/smallest/{next(_numbers)}"
    client = _client()
    client.key_value_set(f"{key}/{jax.process_index()}", str(value))
    return min(int(client.blocking_key_value_get(f"{key}/{other}", PATIENCE)) for other in range(count()))


def find_gone(seconds: float = 10) -> list[int] | None:
    """Find the processes that do not answer, asked by all that are left when a program failed; None if unknown."""
    try:
        _client().wait_at_barrier("fedvlm/gone", int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        named = re.search(r"timed out task names:\s*(\d+(?:\s+\d+)*)", str(error))
        return sorted(map(int, named[1].split())) if named else None
    return []


def _client() -> Any:
    # Of the service that jax's processes meet at; jax has no public way to it, and orbax takes the same.
    from jax._src import distributed

    return distributed.global_state.client
