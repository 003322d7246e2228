"""CE-LoRA (arXiv 2503.23869): ΔW = B C A, of which only C, rank × rank numbers, leaves the client.

Every client receives a C of its own, C_k = Σ_j w_kj C_j. The weights are a softmax of the cosine similarity of what the
clients' C have become; the paper measures similarity of data and of models, and its equation was taken from a summary.
C starts as the identity, so that the adapter starts as plain LoRA. The clients are those in the server's pool, see
`components/personalized_download.py`, and the client itself with the C that it trained last, if it ever did.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.components.factors import cosines, map_sites, merge_middle, only, softmax_among
from fedvlm_jax.methods.components.personalized_download import make_delivering_method
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Positive


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of ce-lora"""

    temperature: Positive = 0.5
    """Temperature of the softmax over the clients' similarities."""


def make(setup: Setup) -> Method:
    """Make ce-lora: all three factors are trained, the middle one is mixed."""
    temperature = setup.own(Options).temperature

    def extend(site: dict[str, Array]) -> dict[str, Array]:
        *stack, _, rank = site["a"].shape
        return {**site, "c": jnp.broadcast_to(jnp.eye(rank, dtype=site["a"].dtype), (*stack, rank, rank))}

    def weigh(moved: PyTree, pool: PyTree, others: Bool[Array, " P"], sent: Bool[Array, ""]) -> Float[Array, " P"]:
        likeness = jnp.append(cosines(moved, pool), 1.0)  # with itself, last
        return softmax_among(likeness / temperature, jnp.append(others, sent))[:-1]

    def assemble(own: PyTree, delivered: PyTree, scales: PyTree) -> lora.Adapter:
        del delivered  # it has taken the place of C
        middle, rest = tree.partition(own, only("c"))
        return tree.combine(merge_middle(rest, middle, "c"), scales)

    return make_delivering_method(
        "ce-lora", "arXiv 2503.23869: ΔW = B C A, A and B private; C_k ← Σ_j w_kj C_j, w_k = softmax of similarity",
        setup, extend=lambda factors: map_sites(extend, factors), trained=only("a", "b", "c"), sent=only("c"),
        keep_own=False, assemble=assemble, weigh=weigh,
    )  # fmt: skip
