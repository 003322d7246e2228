"""Ranks that differ between clients: everybody's adapter has the largest rank, and what is beyond one's own is zero.

A pair of a column of A and a row of B that are both zero has no gradient, so it stays zero. The scale is the largest
rank's for all, so that the same factors mean the same update everywhere.

Each direction, that is such a pair, is averaged over those who have it, with their weights made to sum to 1, and stays
as it is where none of them is there. To count as zero what a client lacks (zero padding, arXiv 2401.06432) shrinks the
higher directions, and a round of low ranks alone ends them for good.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax.methods.base import Setup
from fedvlm_jax.methods.components.norms import leaf_name
from fedvlm_jax.utils import tree

__all__ = ["cut", "find_held", "mean", "of", "scale", "where_sent"]

Held = Float[Array, "K R"]


def of(setup: Setup, number: Int[Array, ""]) -> Int[Array, ""]:
    """The rank of a client."""
    return jnp.asarray(np.asarray(setup.ranks, np.int32))[number]


def cut(part: PyTree, rank: Int[Array, ""]) -> PyTree:
    """Zero what is beyond the rank: columns of A, rows of B."""

    def one(path: str, leaf: Array) -> Array:
        size = {"a": leaf.shape[-1], "b": leaf.shape[-2]}.get(leaf_name(path), 1) if leaf.ndim > 1 else 1
        return scale(path, leaf, (jnp.arange(size) < rank).astype(leaf.dtype))

    return tree.unflatten({path: one(path, leaf) for path, leaf in tree.flatten(part).items()})


def find_held(setup: Setup, ranks: Int[Array, " K"]) -> Held:
    """1 where a client of the cohort has a direction, 0 where it does not."""
    return (jnp.arange(max(setup.ranks)) < ranks[:, None]).astype(jnp.float32)


def mean(updates: PyTree, weights: Float[Array, " K"], held: Held) -> PyTree:
    """Σ p_k Δ_k of every direction over those who have it, Σ p_k = 1 among them; 0 where nobody does."""
    sums = tree.weighted_sum({"updates": updates, "held": held}, weights)
    share = jnp.where(sums["held"] > 0, 1 / jnp.maximum(sums["held"], 1e-12), 0)
    flat = tree.flatten(sums["updates"])
    return tree.unflatten({path: scale(path, leaf, share) for path, leaf in flat.items()})


def where_sent(sent: Bool[Array, " R"], new: PyTree, old: PyTree) -> PyTree:
    """The new values of the directions that were sent, the old ones of the others."""
    before, kept = tree.flatten(old), 1.0 - sent
    return tree.unflatten(
        {
            path: scale(path, leaf, sent.astype(leaf.dtype)) + scale(path, before[path], kept, otherwise=0)
            for path, leaf in tree.flatten(new).items()
        }
    )


def scale(path: str, leaf: Array, by: Float[Array, " R"], otherwise: float = 1) -> Array:
    """The leaf with each of its directions times a number; times `otherwise` what has no directions."""
    name = leaf_name(path)
    if name == "a":
        return leaf * by
    return leaf * (by[:, None] if name == "b" else otherwise)
