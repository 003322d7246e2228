"""Updates of the base itself: one float32 matrix per site, the same for all clients.

A round's update arrives as two factors. As long as the factors of all rounds of the run are smaller than the matrix
they make, they are kept beside each other, at places that the round decides; otherwise the matrix is kept. Which of
the two is settled once, so shapes never change. The base is formed from it once a round, for all clients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Number
from fedvlm_jax.methods.components.factors import by_site, map_sites, matmul


def start(adapter: lora.Adapter, places: int, rounds: int) -> PyTree:
    """Make room for the updates of a run, in which every place of a round adds factors of the adapter's rank."""

    def make_room(site: dict[str, Array]) -> dict[str, Array]:
        *stack, d_in, rank = site["a"].shape
        d_out, room = site["b"].shape[-1], rank * places * rounds
        shapes = {"left": (*stack, d_in, room), "right": (*stack, room, d_out)}
        if room * (d_in + d_out) >= d_in * d_out:
            shapes = {"delta": (*stack, d_in, d_out)}
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    return map_sites(make_room, adapter)


def add(deltas: PyTree, update: PyTree, scales: PyTree, round_: Number) -> PyTree:
    """Add a round's update, at every site `left` [*stack, d_in, r] and `right` [*stack, r, d_out] times its scale."""

    def add_to_site(site: dict[str, Array], factors: dict[str, Array], scale: dict[str, Array]) -> dict[str, Array]:
        left = (factors["left"] * scale["scale"][..., None, None]).astype(jnp.float32)
        right = factors["right"].astype(jnp.float32)
        if "delta" in site:
            return {"delta": site["delta"] + matmul(left, right)}
        at = (round_ - 1) * left.shape[-1]
        return {
            "left": jax.lax.dynamic_update_slice_in_dim(site["left"], left, at, left.ndim - 1),
            "right": jax.lax.dynamic_update_slice_in_dim(site["right"], right, at, right.ndim - 2),
        }

    return map_sites(add_to_site, deltas, update, scales)


def apply(params: PyTree, deltas: PyTree) -> PyTree:
    """Add the updates to the base; one site at a time, for all their matrices together are a second base."""
    for path, site in by_site(deltas).items():
        whole = site["delta"] if "delta" in site else matmul(site["left"], site["right"])
        params = lora.add_to_weights(params, {path: whole})
    return params
