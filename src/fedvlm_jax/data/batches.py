"""Batches of local steps: which example a client sees at which step, rows padded to few shapes, and reading ahead.

Padding repeats a real row instead of zeros, because an attention mask without a single one makes NaN in a softmax, and
a NaN survives multiplication by a mask.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from fedvlm_jax.utils.random_streams import Stream

T = TypeVar("T")
IGNORED = -100  # label of a position that no loss counts, Hugging Face's convention
LABELS = ("labels", "rejected_labels")  # the chosen answer's in a batch, and the rejected one's
MULTIPLE = 4  # token axes are padded to multiples of this: few shapes, little waste


def local_batches(seed: int, round_: int, client: int, n: int, steps: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw epochs of permutations and cut them into batches.

    With `n >= batch` every slot is filled, and a batch may span the end of an epoch. With `0 < n < batch` every step is
    an epoch: each example once, the other slots masked (not repeated, so no example weighs more than another). More
    steps continue the same sequence, which depends on the other arguments alone. Returns indices [S, B] int32 and the
    mask [S, B] of the slots that count.

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
    """Count the steps in which `local_batches` shows each of `n` examples `epochs` times.

    Returns ⌈epochs · n / min(n, batch)⌉ local steps, 0 without examples.

    >>> count_steps(10, 1.1, 1)  # the decimal number, not the binary fraction a little above it
    11
    """
    return math.ceil(Fraction(str(epochs)) * n / min(n, batch)) if n else 0


def bucket(n: int) -> int:
    """Find the smallest of 8, 12, 16, 24, 32, 48 … that holds `n`: at most a third is padding.

    >>> bucket(9), bucket(17)
    (12, 24)
    """
    size = 8
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_rows(rows: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " size"]:
    """Pad row numbers to `size` with the first of them (with row 0, if there are none); refuse more than `size`.

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
    """The rows that a cohort of K clients reads in a round."""

    rows: Int[np.ndarray, "cohort rows"]  # int64, M of each client into the arrays of an `Examples`; padded
    indices: Int[np.ndarray, "cohort steps batch"]  # int32, into the M rows of the same client
    mask: Bool[np.ndarray, "cohort steps batch"]  # False where a slot does not count
    counts: Int[np.ndarray, " cohort"]  # int64, training examples of each client in all (its weight by examples)


def round_rows(
    seed: int,
    round_: int,
    cohort: Sequence[int],
    rows: Sequence[Int[np.ndarray, " n"]],
    steps: int,
    batch: int,
    size: int,
    taken: Sequence[int],
) -> RoundRows:
    """Draw `local_batches` for a cohort with these training rows, each client with only the M that it will touch.

    M is `size`. Of each client the first `taken` steps count, and no rows are read for the others.
    """
    counts = [len(held) for held in rows]
    drawn = [local_batches(seed, round_, client, n, steps, batch) for client, n in zip(cohort, counts, strict=True)]
    for (_, mask), first in zip(drawn, taken, strict=True):
        mask[first:] = False
    # Only rows that count are read and moved to the device.
    touched = [np.unique(indices[mask]) for indices, mask in drawn]
    padded = [pad_rows(held[used], size) for held, used in zip(rows, touched, strict=True)]
    indices = [np.where(mask, np.searchsorted(used, at), 0) for (at, mask), used in zip(drawn, touched, strict=True)]
    # Shapes are stated because a cohort may be empty.
    return RoundRows(
        rows=np.asarray(padded, np.int64).reshape(len(cohort), size),
        indices=np.asarray(indices, np.int32).reshape(len(cohort), steps, batch),
        mask=np.asarray([mask for _, mask in drawn], bool).reshape(len(cohort), steps, batch),
        counts=np.asarray(counts, np.int64),
    )


def read_ahead(make: Callable[[int], T], start: int, stop: int, *, ahead: int = 2) -> Iterator[T]:
    """Yield `make(start)`, …, `make(stop - 1)` in order, up to `ahead` of them made before they are asked for.

    By grain, whose elements come in their order whatever the number of threads, so that a run's numbers never depend on
    it. `make` runs in `ahead` threads and never returns None (grain would leave it out); its exceptions come out of the
    iterator in their turn.

    >>> list(read_ahead(lambda index: index * 10, 0, 3, ahead=0))
    [0, 10, 20]
    """
    if ahead < 1 or stop - start < 2:
        yield from map(make, range(start, stop))
        return
    import grain  # late: it takes a second to import

    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    yield from grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)
