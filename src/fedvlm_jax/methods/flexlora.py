"""FlexLoRA (arXiv 2402.11505): the exact mean of the clients' updates, cut to the best factors of every client's rank.

Σ p_k B_k A_k is a product of stacked factors; QR of both and a small SVD give its best rank-R factors, and a client of
rank r takes the first r of them, which are the best of rank r. The mean itself is never formed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.parts.factored import map_sites, side_by_side
from fedvlm_jax.methods.record import Message, Method, Setup
from fedvlm_jax.methods.share import FACTORS, Parts, make_share_method

__all__ = ["make"]

SOURCE = "arXiv 2402.11505: Σ p_k B_k A_k = U Σ Vᵀ; client k gets the best factors of its rank"
_NEW_BASIS = "every round's SVD gives the factors another basis, in which the last round's state means nothing"
REFUSES: dict[str, str] = dict.fromkeys(("server", "local.scaffold"), _NEW_BASIS)


def make(setup: Setup) -> Method:
    """flexlora, as a share rule with its own average."""
    return make_share_method("flexlora", SOURCE, FACTORS, setup, Parts(average=average, refuses=REFUSES))


def average(shared: PyTree, messages: Message, weights: Float[Array, " cohort"]) -> PyTree:
    """From the factors now to the best ones of the mean's."""

    def one(now: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
        rank = now["a"].shape[-1]
        left, right = side_by_side(now["a"] + update["a"], now["b"] + update["b"], weights)
        mean = {"site": {"a": left, "b": right, "scale": jnp.ones(left.shape[:-2])}}
        best = lora.truncate(mean, rank)["site"]
        counts = weights.sum() > 0
        return {name: jnp.where(counts, best[name] - now[name], 0) for name in "ab"}

    return map_sites(one, shared, messages)
