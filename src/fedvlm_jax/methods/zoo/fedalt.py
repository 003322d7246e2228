"""FedALT (arXiv 2503.11880): a client's own adapter beside the mean of the *others'*, weighed token by token.

    y = x W_0 + s [α(x) x A_k B_k + (1 − α(x)) x A_R B_R],    α(x) from a private router, softmax(x · gate)

The own pair is never overwritten; the rest-of-the-world pair is frozen locally, and renewed by the server. The others
are those in the server's pool, see `parts/delivered.py`, and all of them count alike.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.low_rank import map_sites
from fedvlm_jax.methods.components.norms import only
from fedvlm_jax.methods.components.personalized_download import make_delivering_method

SOURCE = "arXiv 2503.11880: y = W_0 x + s[α(x) B_k A_k x + (1−α(x)) B^R A^R x]; A^R, B^R = means over the other clients"


def make(setup: Setup) -> Method:
    """fedalt: own pair and router are trained, the pair is sent."""
    return make_delivering_method(
        "fedalt", SOURCE, setup, extend=extend, trained=only("a", "b", "gate"), assemble=assemble, weigh=weigh
    )


def extend(factors: PyTree) -> PyTree:
    """A router at every site; zero, so that both pairs weigh a half."""
    return map_sites(lambda site: {**site, "gate": jnp.zeros((*site["a"].shape[:-1], 2), site["a"].dtype)}, factors)


def weigh(moved: PyTree, pool: PyTree, others: Bool[Array, " P"], sent: Bool[Array, ""]) -> Float[Array, " P"]:
    """The mean of the others."""
    del moved, pool, sent
    return others / jnp.maximum(others.sum(), 1)


def assemble(own: PyTree, rest: PyTree, scales: PyTree) -> lora.Adapter:
    """Both pairs as one adapter of twice the rank, in two groups."""

    def one(mine: dict[str, Array], theirs: dict[str, Array], scale: dict[str, Array]) -> dict[str, Array]:
        a = jnp.concatenate([mine["a"], theirs["a"]], axis=-1)
        return {**mine, "a": a, "b": jnp.concatenate([mine["b"], theirs["b"]], axis=-2), **scale}

    return map_sites(one, own, rest, scales)
