"""HetLoRA (arXiv 2401.06432): factors of unlike ranks, averaged by the norm of their products.

The paper weighs a client by the norm of its whole model's update and pads its factors with zeros. Here every site has a
weight of its own, from the norm of the product at this site; and each direction is averaged over those who have it,
because zeros in place of what a client lacks shrink the higher directions, and end them where a round has low ranks
alone. The paper's pruning of ranks during training is not here; ranks are what `--lora.ranks` says.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.methods.base import Message, Method, Setup
from fedvlm_jax.methods.components.low_rank import map_sites, product_norms
from fedvlm_jax.methods.rule_based import FACTORS, Held, Parts, make_share_method

SOURCE = (
    "arXiv 2401.06432: each direction averaged over who has it, weights ∝ ‖B_k A_k‖_F; client k has its own rank; "
    "a weight per site, the paper's is of the whole model, and no ranks are pruned"
)
REFUSES: dict[str, str] = {
    "local.scaffold": "its control variates aim at the plain mean of the clients, which hetlora replaces",
    "train.weighting": "it weighs clients by the norm of their product",
}


def make(setup: Setup) -> Method:
    """hetlora, as a share rule with its own average."""
    return make_share_method(
        "hetlora", SOURCE, FACTORS, setup, Parts(average=average, refuses=REFUSES, moot=frozenset({"train.weighting"}))
    )


def average(shared: PyTree, messages: Message, weights: Float[Array, " cohort"], held: Held | None) -> PyTree:
    """Σ w_k Δ_k, w_k ∝ ‖a_k b_k‖_F at every site, among those who count and have the direction."""

    def one(now: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
        rank, stack = now["a"].shape[-1], now["a"].ndim - 2
        has = (jnp.ones((len(weights), rank)) if held is None else held).reshape(-1, *[1] * stack, rank)
        norms = product_norms((now["a"] + update["a"]) * has[..., None, :], now["b"] + update["b"])  # [K, *stack]
        norms = jnp.where((weights > 0).reshape(-1, *[1] * stack), norms, 0)[..., None] * has  # [K, *stack, R]
        share = norms / jnp.maximum(norms.sum(axis=0), 1e-12)

        def mean(leaf: Array, wide: Array) -> Array:
            return jnp.sum(jnp.where(wide == 0, 0, wide * leaf), axis=0)

        return {"a": mean(update["a"], share[..., None, :]), "b": mean(update["b"], share[..., :, None])}

    return map_sites(one, shared, messages)
