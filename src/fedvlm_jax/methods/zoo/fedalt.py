"""FedALT (arXiv 2503.11880): a client's own adapter beside the mean of the *others'*, weighed token by token.

    y = x W_0 + s [α(x) x A_k B_k + (1 − α(x)) x A_R B_R],    α(x) from a private router, softmax(x · gate)

The own pair is never overwritten; the rest-of-the-world pair is frozen locally, and renewed by the server. The others
are those in the server's pool, see `components/personalized_download.py`, and all of them count alike.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.factors import map_sites, only
from fedvlm_jax.methods.components.personalized_download import make_delivering_method


def make(setup: Setup) -> Method:
    """Make fedalt: the client's pair and router are trained, the pair is sent."""

    def extend(site: dict[str, Array]) -> dict[str, Array]:
        # A router of zeros, with which both pairs weigh a half.
        return {**site, "gate": jnp.zeros((*site["a"].shape[:-1], 2), site["a"].dtype)}

    def weigh(moved: PyTree, pool: PyTree, others: Bool[Array, " P"], sent: Bool[Array, ""]) -> Float[Array, " P"]:
        del moved, pool, sent
        return others / jnp.maximum(others.sum(), 1)

    def join(mine: dict[str, Array], theirs: dict[str, Array], scale: dict[str, Array]) -> dict[str, Array]:
        # One adapter of twice the rank; the gate tells its two groups apart.
        a = jnp.concatenate([mine["a"], theirs["a"]], axis=-1)
        return {**mine, "a": a, "b": jnp.concatenate([mine["b"], theirs["b"]], axis=-2), **scale}

    return make_delivering_method(
        "fedalt",
        "arXiv 2503.11880: y = W_0 x + s[α(x) B_k A_k x + (1−α(x)) B^R A^R x]; A^R, B^R = means over the other clients",
        setup, extend=lambda factors: map_sites(extend, factors), trained=only("a", "b", "gate"),
        assemble=lambda own, rest, scales: map_sites(join, own, rest, scales), weigh=weigh,
    )  # fmt: skip
