"""HetLoRA (arXiv 2401.06432): factors padded with zeros to the largest rank, averaged by the norm of their products.

The paper's pruning of ranks during training is not here; ranks are what `--lora.ranks` says.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.methods.parts.factored import map_sites, product_norms
from fedvlm_jax.methods.record import Message, Method, Setup
from fedvlm_jax.methods.share import FACTORS, Parts, make_share_method

__all__ = ["make"]

SOURCE = "arXiv 2401.06432: zero-padded factors, weights ∝ ‖B_k A_k‖_F; client k truncates to its rank"
REFUSES: dict[str, str] = {
    "local.scaffold": "its control variates aim at the plain mean of the clients, which hetlora replaces",
    "train.weighting": "it weighs clients by the norm of their product",
}


def make(setup: Setup) -> Method:
    """hetlora, as a share rule with its own average."""
    return make_share_method(
        "hetlora", SOURCE, FACTORS, setup, Parts(average=average, refuses=REFUSES, moot=frozenset({"train.weighting"}))
    )


def average(shared: PyTree, messages: Message, weights: Float[Array, " cohort"]) -> PyTree:
    """Σ w_k Δ_k, w_k ∝ ‖a_k b_k‖_F at every site, among those who count."""

    def one(now: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
        norms = product_norms(now["a"] + update["a"], now["b"] + update["b"])  # [K, *stack]
        counts = (weights > 0).reshape(-1, *[1] * (norms.ndim - 1))
        norms = jnp.where(counts, norms, 0)
        share = norms / jnp.maximum(norms.sum(axis=0), 1e-12)

        def mean(leaf: Array) -> Array:
            wide = share.reshape(*share.shape, 1, 1)
            return jnp.sum(jnp.where(wide == 0, 0, wide * leaf), axis=0)

        return jax.tree.map(mean, update)

    return map_sites(one, shared, messages)
