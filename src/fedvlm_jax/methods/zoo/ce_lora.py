"""CE-LoRA (arXiv 2503.23869): ΔW = B C A, of which only C, rank × rank numbers, leaves the client.

Every client receives a C of its own, C_k = Σ_j w_kj C_j. The weights are a softmax of the cosine similarity of what the
clients' C have become; the paper measures similarity of data and of models, and its equation was taken from a summary.
C starts as the identity, so that the adapter starts as plain LoRA. The clients are those in the server's pool, see
`parts/delivered.py`, and the client itself with the C that it trained last, if it ever did.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components import mixing
from fedvlm_jax.methods.components.low_rank import map_sites, matmul
from fedvlm_jax.methods.components.norms import only
from fedvlm_jax.methods.components.personalized_download import make_delivering_method
from fedvlm_jax.methods.config import MethodOptions
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Positive

SOURCE = "arXiv 2503.23869: ΔW = B C A, A and B private; C_k ← Σ_j w_kj C_j, w_k = softmax of similarity"


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of ce-lora"""

    temperature: Positive = 0.5
    """Temperature of the softmax over the clients' similarities."""


def make(setup: Setup) -> Method:
    """ce-lora: all three factors are trained, the middle one is mixed."""
    temperature = setup.own(Options).temperature

    def weigh(moved: PyTree, pool: PyTree, others: Bool[Array, " P"], sent: Bool[Array, ""]) -> Float[Array, " P"]:
        likeness = jnp.append(mixing.cosines(moved, pool), 1.0)  # with itself, last
        return mixing.softmax_among(likeness / temperature, jnp.append(others, sent))[:-1]

    return make_delivering_method(
        "ce-lora", SOURCE, setup,
        extend=extend, trained=only("a", "b", "c"), sent=only("c"), keep_own=False,
        assemble=lambda own, _, scales: assemble(own, scales), weigh=weigh,
    )  # fmt: skip


def extend(factors: PyTree) -> PyTree:
    """c = 1 at every site."""

    def one(site: dict[str, Array]) -> dict[str, Array]:
        a = site["a"]
        return {**site, "c": jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), (*a.shape[:-2], *[a.shape[-1]] * 2))}

    return map_sites(one, factors)


def assemble(own: PyTree, scales: PyTree) -> lora.Adapter:
    """C is multiplied into B."""
    middle, rest = tree.partition(own, only("c"))
    merged = map_sites(lambda site, between: {**site, "b": matmul(between["c"], site["b"])}, rest, middle)
    return tree.combine(merged, scales)
