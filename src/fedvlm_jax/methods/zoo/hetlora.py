"""HetLoRA (arXiv 2401.06432): factors of unlike ranks, averaged by the norm of their products.

The paper weighs a client by the norm of its whole model's update and pads its factors with zeros. Here every site has a
weight of its own, from the norm of the product at this site; and each direction is averaged over those who have it,
because zeros in place of what a client lacks shrink the higher directions, and end them where a round has low ranks
alone. The paper's pruning of ranks during training is not here; ranks are what `--lora.ranks` says.
"""

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax.methods.base import Held, Method, Setup, Weights
from fedvlm_jax.methods.components.factors import map_sites, matmul
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method


def make(setup: Setup) -> Method:
    """Make hetlora: a share rule with another average."""
    source = (
        "arXiv 2401.06432: each direction averaged over who has it, weights ∝ ‖B_k A_k‖_F; client k has its own rank; "
        "a weight per site, the paper's is of the whole model, and no ranks are pruned"
    )
    refuses = {
        "local.scaffold": "its control variates aim at the plain mean of the clients, which hetlora replaces",
        "train.weighting": "it weighs clients by the norm of their product",
    }
    parts = Parts(average=average, refuses=refuses, moot=frozenset({"train.weighting"}))
    return make_share_method("hetlora", source, FACTORS, setup, parts)


def average(shared: PyTree, messages: PyTree, weights: Weights, held: Held | None) -> PyTree:
    """Compute Σ w_k Δ_k, w_k ∝ ‖a_k b_k‖_F at every site, among those who count and have the direction."""

    def average_site(now: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
        rank, stack = now["a"].shape[-1], now["a"].ndim - 2
        has = (jnp.ones((len(weights), rank)) if held is None else held).reshape(-1, *[1] * stack, rank)
        a, b = (now["a"] + update["a"]) * has[..., None, :], now["b"] + update["b"]
        squared = jnp.sum(matmul(a.mT, a) * matmul(b, b.mT).mT, axis=(-2, -1))  # ‖ab‖² = tr(aᵀa · bbᵀ), [K, *stack]
        norms = jnp.where((weights > 0).reshape(-1, *[1] * stack), jnp.sqrt(jnp.maximum(squared, 0)), 0)
        norms = norms[..., None] * has  # [K, *stack, R]
        share = norms / jnp.maximum(norms.sum(axis=0), 1e-12)

        def mean(leaf: Array, wide: Array) -> Array:
            # Not a product with 0: a client that does not count may hold anything, infinities too.
            return jnp.sum(jnp.where(wide == 0, 0, wide * leaf), axis=0)

        return {"a": mean(update["a"], share[..., None, :]), "b": mean(update["b"], share[..., :, None])}

    return map_sites(average_site, shared, messages)
