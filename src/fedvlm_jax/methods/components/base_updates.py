"""Updates of the base itself: one float32 matrix per site, the same for all clients.

A round's update arrives as two factors. As long as the factors of all rounds of the run are smaller than the matrix
they make, they are kept beside each other, at places that the round decides; otherwise the matrix is kept. Which of
the two is settled once, so shapes never change. The base is formed from it once a round, for all clients.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.components.low_rank import by_site, matmul
from fedvlm_jax.utils import tree

Factors = Mapping[str, tuple[Array, Array]]


def start(adapter: lora.Adapter, rank: int, rounds: int) -> PyTree:
    """Make room for the updates of a run.

    Args:
        adapter: has the sites and their shapes.
        rank: of the update that a round adds.
        rounds: of the run.
    """
    flat: dict[str, Any] = {}
    for path, site in by_site(adapter).items():
        *stack, d_in, _ = site["a"].shape
        d_out, room = site["b"].shape[-1], rank * rounds
        if room * (d_in + d_out) < d_in * d_out:
            flat[f"{path}/left"] = jnp.zeros((*stack, d_in, room), jnp.float32)
            flat[f"{path}/right"] = jnp.zeros((*stack, room, d_out), jnp.float32)
        else:
            flat[f"{path}/delta"] = jnp.zeros((*stack, d_in, d_out), jnp.float32)
    return tree.unflatten(flat)


def add(deltas: PyTree, update: Factors, round_: Int[Array, ""]) -> PyTree:
    """Add a round's update, given as site -> factors [*stack, d_in, r] and [*stack, r, d_out]; scales are in them."""
    flat: dict[str, Any] = {}
    for path, site in by_site(deltas).items():
        left, right = (part.astype(jnp.float32) for part in update[path])
        if "delta" in site:
            flat[f"{path}/delta"] = site["delta"] + matmul(left, right)
            continue
        at = (round_ - 1) * left.shape[-1]
        flat[f"{path}/left"] = jax.lax.dynamic_update_slice_in_dim(site["left"], left, at, left.ndim - 1)
        flat[f"{path}/right"] = jax.lax.dynamic_update_slice_in_dim(site["right"], right, at, right.ndim - 2)
    return tree.unflatten(flat)


def apply(params: PyTree, deltas: PyTree) -> PyTree:
    """Add the updates to the base; one site at a time, for all their matrices together are a second base."""
    for path, site in by_site(deltas).items():
        whole = site["delta"] if "delta" in site else matmul(site["left"], site["right"])
        params = lora.add_to_weights(params, {path: whole})
    return params
