"""Batches of local steps: which example a client sees at which step, and rows padded to few shapes.

A round's arrays hold what its clients touch in that round: rows [K, M] and, into them, indices [K, S, B] with a mask.
Padding repeats a real row instead of zeros, because an attention mask without a single one makes NaN in a softmax, and
a NaN survives multiplication by a mask.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from fedvlm_jax.utils.random_streams import Stream


def local_batches(
    seed: int, round_: int, client: int, n: int, steps: int, batch: int
) -> tuple[Int[np.ndarray, "steps batch"], Bool[np.ndarray, "steps batch"]]:
    """Draw epochs of permutations and cut them into batches.

    With `n >= batch` every slot is filled, and a batch may span the end of an epoch. With `0 < n < batch` every step is
    an epoch: each example once, the other slots masked (not repeated, so no example weighs more than another). With
    `n = 0` everything is masked. More steps continue the same sequence, which depends on the other arguments alone.

    Args:
        n: examples the client has.
        steps: local steps S.
        batch: slots B of a step.

    Returns:
        Indices [S, B] int32 in 0 … max(n, 1) - 1 and the mask [S, B] of the slots that count.

    >>> indices, mask = local_batches(seed=0, round_=1, client=0, n=3, steps=2, batch=2)
    >>> sorted(indices.ravel()[:3].tolist()), mask.tolist()  # the first epoch, then a new one begins
    ([0, 1, 2], [[True, True], [True, True]])
    """
    shape = (steps, batch)
    if n <= 0 or steps <= 0:
        return np.zeros(shape, np.int32), np.zeros(shape, bool)
    rng = np.random.default_rng([Stream.BATCHES, seed, round_, client])
    width = min(n, batch)  # fewer examples than slots: a step is an epoch
    epochs = -(-steps * width // n)
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)])[: steps * width].reshape(steps, width)
    indices = np.zeros(shape, np.int32)
    indices[:, :width] = order
    return indices, np.broadcast_to(np.arange(batch) < width, shape).copy()


def count_steps(n: int, epochs: float, batch: int) -> int:
    """Count the steps in which `local_batches` shows all of `n` examples `epochs` times: ⌈E n / B⌉ where n ≥ B.

    Where n < B each step is an epoch. The last step is filled from the epoch that follows.

    >>> count_steps(10, 1.1, 1)  # the decimal number, not the binary fraction a little above it
    11
    """
    return math.ceil(Fraction(str(epochs)) * n / min(n, batch)) if n else 0


def bucket(n: int, sizes: Sequence[int] | None = None) -> int:
    """Find the smallest size that holds `n`: from `sizes`, else 8, 12, 16, 24, 32, 48 …: at most a third padding.

    Raises:
        ValueError: n is larger than all of `sizes`.

    >>> bucket(9), bucket(17)
    (12, 24)
    """
    if sizes is None:
        size = 8
        while size < n:
            size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
        return size
    fitting = [size for size in sizes if size >= n]
    if not fitting:
        raise ValueError(f"{n} rows do not fit into any of the sizes {sorted(sizes)}")
    return min(fitting)


def pad_rows(rows: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " size"]:
    """Pad row numbers to `size` with the first of them (with row 0, if there are none).

    Raises:
        ValueError: there are more than `size`.

    >>> pad_rows(np.asarray([5, 7]), 4).tolist()
    [5, 7, 5, 5]
    """
    if len(rows) > size:
        raise ValueError(f"{len(rows)} rows do not fit into {size}")
    padded = np.full(size, rows[0] if len(rows) else 0, np.int64)
    padded[: len(rows)] = rows
    return padded


class RoundRows(NamedTuple):
    """The rows that a cohort reads in a round.

    Attributes:
        rows: [K, M] int64, into the arrays of an `Examples`; padded.
        indices: [K, S, B] int32, into the M rows of the same client.
        mask: [K, S, B] bool, False where a slot does not count.
        counts: [K] int64, how many training examples each client has in all (its weight by examples).
    """

    rows: Int[np.ndarray, "cohort rows"]
    indices: Int[np.ndarray, "cohort steps batch"]
    mask: Bool[np.ndarray, "cohort steps batch"]
    counts: Int[np.ndarray, " cohort"]


def round_rows(
    seed: int,
    round_: int,
    cohort: Sequence[int],
    rows: Sequence[Int[np.ndarray, " n"]],
    steps: int,
    batch: int,
    sizes: Sequence[int] | None = None,
    taken: Sequence[int] | None = None,
) -> RoundRows:
    """Draw `local_batches` for a cohort, each client with only the rows that it will touch, M a bucket of the most.

    Args:
        seed, round_, steps, batch: as in `local_batches`.
        cohort: the clients' numbers, K of them.
        rows: the training rows of each of these K clients.
        sizes: the allowed M, see `bucket`.
        taken: the first so many steps of each of these clients count, and no rows are read for the others; all S by
            default.
    """
    counts = [len(held) for held in rows]
    drawn = [local_batches(seed, round_, client, n, steps, batch) for client, n in zip(cohort, counts, strict=True)]
    for (_, mask), first in zip(drawn, [steps] * len(drawn) if taken is None else taken, strict=True):
        mask[first:] = False
    # Only rows that count are read and moved to the device.
    touched = [np.unique(indices[mask]) for indices, mask in drawn]
    size = bucket(max((len(used) for used in touched), default=0), sizes)
    padded = [pad_rows(held[used], size) for held, used in zip(rows, touched, strict=True)]
    indices = [np.where(mask, np.searchsorted(used, at), 0) for (at, mask), used in zip(drawn, touched, strict=True)]
    # Shapes are stated because a cohort may be empty.
    return RoundRows(
        rows=np.asarray(padded, np.int64).reshape(len(cohort), size),
        indices=np.asarray(indices, np.int32).reshape(len(cohort), steps, batch),
        mask=np.asarray([mask for _, mask in drawn], bool).reshape(len(cohort), steps, batch),
        counts=np.asarray(counts, np.int64),
    )
