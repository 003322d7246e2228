"""Clipping of whole messages, and their sum: it bounds how far one client moves a round (arXiv 1710.06963)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax.messages.pool import to_rows
from fedvlm_jax.methods.base import Weights


class ClippedSum(NamedTuple):
    """The sum of a round's clipped messages, before noise.

    Attributes:
        total: Σ_k c_k [D], over the clients that count, all alike.
        below: how many of them did not have to be clipped.
        sampled: how many there are.
    """

    total: Float[Array, " entries"]
    below: Float[Array, ""]
    sampled: Float[Array, ""]


class Factors(NamedTuple):
    """The factors that clip rows, and which rows did not have to be clipped."""

    by: Float[Array, " cohort"]
    below: Bool[Array, " cohort"]


def find_factors(rows: Float[Array, "cohort entries"], clip: Float[Array, ""] | float) -> Factors:
    """Find min(1, clip / norm) of every row; 0 where a number is not finite.

    >>> find_factors(jnp.asarray([[3.0, 4.0], [0.3, 0.4], [jnp.inf, 0.0]]), 2.5).by.tolist()
    [0.5, 1.0, 0.0]
    """
    largest = jnp.max(jnp.abs(rows), axis=1, initial=0)
    finite = jnp.isfinite(largest)
    # Of numbers between -1 and 1: the square of a large number may overflow, and then a norm says nothing.
    unit = jnp.where(finite, jnp.maximum(largest, 1e-30), 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(jnp.where(finite[:, None], rows, 0) / unit[:, None]), axis=1))
    room = clip / unit / norm
    return Factors(jnp.where(finite, jnp.minimum(room, 1), 0), finite & (room >= 1))


def sum_clipped(messages: PyTree, weights: Weights, clip: Float[Array, ""] | float) -> ClippedSum:
    """Clip each client's whole message to a norm and add up those of who counts, whatever else their weights are.

    A message that holds a number that is not finite counts as zero. The counts ride on the one all-reduce of the sum.

    >>> messages = {"b": jnp.asarray([[3.0, 4.0], [0.0, 0.5], [9.0, 9.0]])}
    >>> sum_clipped(messages, jnp.asarray([0.9, 0.1, 0.0]), 2.5).total.tolist()
    [1.5, 2.5]
    """
    rows, counts = to_rows(messages).astype(jnp.float32), weights > 0
    factors = find_factors(jnp.where(counts[:, None], rows, 0), clip)
    valid = counts & (factors.by > 0)
    told = jnp.stack([counts & factors.below, counts], axis=1).astype(jnp.float32)
    scaled = jnp.where(valid[:, None], rows * factors.by[:, None], 0)
    sums = jnp.sum(jnp.concatenate([scaled, told], axis=1), axis=0)
    return ClippedSum(sums[:-2], sums[-2], sums[-1])
