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


class Clipped(NamedTuple):
    """Rows of at most some norm, and which of them did not have to be clipped."""

    rows: Float[Array, "cohort entries"]
    below: Bool[Array, " cohort"]


def clip_rows(rows: Float[Array, "cohort entries"], clip: Float[Array, ""] | float) -> Clipped:
    """Multiply each row by min(1, clip / norm); a row whose norm is not finite becomes zero.

    >>> clip_rows(jnp.asarray([[3.0, 4.0], [0.5, 0.0], [jnp.inf, 0.0]]), 2.5).rows.tolist()
    [[1.5, 2.0], [0.5, 0.0], [0.0, 0.0]]
    """
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    finite = jnp.isfinite(norm)
    kept = jnp.where(finite, rows, 0) * jnp.minimum(1, clip / jnp.maximum(norm, jnp.finfo(rows.dtype).tiny))
    return Clipped(jnp.where(finite, kept, 0), (finite & (norm <= clip))[:, 0])


def sum_clipped(messages: PyTree, weights: Weights, clip: Float[Array, ""] | float) -> ClippedSum:
    """Clip each client's whole message to a norm and add up those of who counts, whatever else their weights are.

    A message whose norm is not finite counts as zero. The counts ride on the one all-reduce of the sum.

    >>> messages = {"b": jnp.asarray([[3.0, 4.0], [0.0, 0.5], [9.0, 9.0]])}
    >>> sum_clipped(messages, jnp.asarray([0.9, 0.1, 0.0]), 2.5).total.tolist()
    [1.5, 2.5]
    """
    counts = weights > 0
    rows = jnp.where(counts[:, None], to_rows(messages).astype(jnp.float32), 0)
    clipped = clip_rows(rows, clip)
    told = jnp.stack([counts & clipped.below, counts], axis=1).astype(jnp.float32)
    sums = jnp.sum(jnp.concatenate([clipped.rows, told], axis=1), axis=0)
    return ClippedSum(sums[:-2], sums[-2], sums[-1])
