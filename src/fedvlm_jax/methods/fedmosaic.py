"""FedMosaic's download (arXiv 2506.11024): an adapter mixed for each client from the others', by how alike they are.

The client's own adapter is trained with the mixed one frozen beside it. Similarity is the cosine of how far the
clients' adapters went; the paper compares gradients of a small model, learns the weight between the two adapters, and
carries Co-LoRA across architectures, none of which is here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.methods.parts import pairs
from fedvlm_jax.methods.parts.delivered import make_delivering_method
from fedvlm_jax.methods.record import Message, Method, Setup

__all__ = ["make"]

SOURCE = "arXiv 2506.11024: client k receives Σ_j w_kj (A_j, B_j), w_k = softmax of similarity over the others"


def make(setup: Setup) -> Method:
    """fedmosaic: own and mixed adapter at a fixed weight."""
    hyper = setup.hyper

    def deliver(start: PyTree, messages: Message, weights: Float[Array, " K"]) -> PyTree:
        shares = pairs.softmax_of_others(pairs.cosines(messages, weights), weights, hyper.mix_temperature, own=False)
        return mix_by(shares, start, messages, weights)

    return make_delivering_method(
        "fedmosaic", SOURCE, setup,
        assemble=lambda own, mixed, scales: pairs.mix(own, mixed, scales, hyper.mosaic_weight),
        deliver=deliver, reads=("hyper.mix_temperature", "hyper.mosaic_weight"),
    )  # fmt: skip


def mix_by(shares: Float[Array, "K K"], start: PyTree, messages: Message, weights: Float[Array, " K"]) -> PyTree:
    """For each client Σ_j shares_kj (start + message_j) [K, …]."""

    def one(first: Array, moved: Array) -> Array:
        counts = weights.reshape(-1, *[1] * (moved.ndim - 1)) > 0
        values = jnp.where(counts, first + moved, 0)
        return jnp.einsum("kj,j...->k...", shares, values, precision="highest")

    return jax.tree.map(one, start, messages)
