"""FlexLoRA (arXiv 2402.11505): the exact mean of the clients' updates, cut to the best factors of every client's rank.

Σ p_k B_k A_k is a product of stacked factors; QR of both and a small SVD give its best rank-R factors, and a client of
rank r takes the first r of them, which are the best of rank r. The mean itself is never formed.

As in the paper the singular values go to B and the rows of A are orthonormal (U Σ and Vᵀ in its notation);
`--method.even` shares them evenly. The two compute the same until they are trained on. A direction that the mean
lacks keeps its A, with B at zero, so that it can be learned again: with both at zero it would have no gradient. And
what lies beyond the largest rank of a round's clients is kept: they neither received nor sent it.

The adapter's scale is alpha / R, R the largest rank, for clients of every rank; the paper's clients scale by
alpha / r_k. Every round gives the factors another basis, so the optimiser starts anew in every round.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Held, Method, MethodOptions, Setup, Weights
from fedvlm_jax.methods.components.factors import map_sites, side_by_side
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method

ROUNDING = 1e-6  # a singular value that is no larger, beside the largest, is rounding


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of flexlora"""

    even: bool = False
    """Share the singular values evenly between A and B; in the paper all of them go to B."""


def make(setup: Setup) -> Method:
    """Make flexlora: a share rule with another average."""
    even = setup.own(Options).even
    source = (
        "arXiv 2402.11505: Σ p_k B_k A_k = U Σ Vᵀ; client k gets the best factors of its rank, B = U Σ, A = Vᵀ "
        "(--method.even: √Σ to each); all ranks have the scale alpha / R, the paper's alpha / r_k"
    )
    new_basis = "every round's SVD gives the factors another basis, in which the last round's state means nothing"

    def average(shared: PyTree, messages: PyTree, weights: Weights, held: Held | None) -> PyTree:
        """Return the way from the factors now to the best ones of the mean."""

        def average_site(now: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
            a, b = now["a"] + update["a"], now["b"] + update["b"]
            if held is not None:  # beyond a client's rank its update is zero, and `a` the server's
                a = a * held.reshape(len(held), *[1] * (a.ndim - 2), -1)
            left, right = side_by_side(a, b, weights)
            if held is not None:
                unsent = 1.0 - jnp.any((held > 0) & (weights > 0)[:, None], axis=0)
                left = jnp.concatenate([left, now["a"] * unsent], axis=-1)
                right = jnp.concatenate([right, now["b"]], axis=-2)
            mean = {"site": {"a": left, "b": right, "scale": jnp.ones(left.shape[:-2])}}
            best = lora.truncate(mean, now["a"].shape[-1], even=even)["site"]
            size = jnp.linalg.norm(best["a"], axis=-2) * jnp.linalg.norm(best["b"], axis=-1)  # [*stack, R]
            known = size > ROUNDING * jnp.max(size, axis=-1, keepdims=True)
            a, b = jnp.where(known[..., None, :], best["a"], now["a"]), jnp.where(known[..., :, None], best["b"], 0)
            counts = weights.sum() > 0
            return {"a": jnp.where(counts, a - now["a"], 0), "b": jnp.where(counts, b - now["b"], 0)}

        return map_sites(average_site, shared, messages)

    parts = Parts(average=average, fresh=True, refuses=dict.fromkeys(("server", "local.scaffold"), new_basis))
    return make_share_method("flexlora", source, FACTORS, setup, parts)
