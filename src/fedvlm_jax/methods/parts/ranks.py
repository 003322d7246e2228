"""Ranks that differ between clients: everybody's adapter has the largest rank, and what is beyond one's own is zero.

A pair of a column of A and a row of B that are both zero has no gradient, so it stays zero. The scale is the largest
rank's for all, so that the same factors mean the same update everywhere. In an average, what a client lacks counts as
zero (zero padding, arXiv 2401.06432).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from fedvlm_jax import tree
from fedvlm_jax.methods.parts.norms import leaf_name
from fedvlm_jax.methods.record import Setup

__all__ = ["cut", "of", "pad_updates"]


def of(setup: Setup, number: Int[Array, ""]) -> Int[Array, ""]:
    """The rank of a client."""
    return jnp.asarray(np.asarray(setup.ranks, np.int32))[number]


def cut(part: PyTree, rank: Int[Array, ""]) -> PyTree:
    """Zero what is beyond the rank: columns of A, rows of B."""
    return tree.unflatten({path: leaf * _mask(path, leaf, rank) for path, leaf in tree.flatten(part).items()})


def pad_updates(shared: PyTree, updates: PyTree, ranks: Int[Array, " cohort"]) -> PyTree:
    """Updates as they are to the server's whole factors: what a client lacks is zero, so it moves by −θ_shared."""
    flat = tree.flatten(shared)

    def pad(path: str, update: Array) -> Array:
        beyond = jax.vmap(lambda rank: 1 - jnp.broadcast_to(_mask(path, flat[path], rank), flat[path].shape))(ranks)
        return update - beyond * flat[path]

    return tree.unflatten({path: pad(path, update) for path, update in tree.flatten(updates).items()})


def _mask(path: str, leaf: Array, rank: Int[Array, ""]) -> Array:
    """1 within the rank, 0 beyond; 1 for what has no rank."""
    name = leaf_name(path)
    if name == "a":
        return (jnp.arange(leaf.shape[-1]) < rank).astype(leaf.dtype)
    if name == "b":
        return (jnp.arange(leaf.shape[-2]) < rank).astype(leaf.dtype)[:, None]
    return jnp.ones((), leaf.dtype)
