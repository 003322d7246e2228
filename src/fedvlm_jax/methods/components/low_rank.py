"""Arithmetic of many clients' low-rank updates that never forms a matrix of the model's own size.

Stacked side by side, Σ_k w_k a_k b_k is one product of [d_in, K·R] and [K·R, d_out]. Everything is batched over stacked
layers and works on one site's factors: `a` [K, *stack, d_in, R], `b` [K, *stack, R, d_out].
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.utils import tree

Site = dict[str, Array]


def by_site(factors: PyTree) -> dict[str, Site]:
    """Group leaves by name under the paths of their sites; for whole adapters, whose layers no rule split."""
    sites: dict[str, Site] = {}
    for path, leaf in tree.flatten(factors).items():
        head, _, name = path.rpartition("/")
        sites.setdefault(head, {})[name] = leaf
    return sites


def map_sites(rule: Callable[..., Mapping[str, Array]], *factors: PyTree) -> PyTree:
    """Make a tree of what `rule` makes of every site's leaves."""
    first, *others = (by_site(part) for part in factors)
    flat: dict[str, Any] = {}
    for path, site in first.items():
        made = rule(site, *(other[path] for other in others))
        flat |= {f"{path}/{name}": leaf for name, leaf in made.items()}
    return tree.unflatten(flat)


def matmul(x: Array, y: Array) -> Array:
    """Multiply in float32."""
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")


def side_by_side(
    a: Float[Array, "K *stack d_in R"], b: Float[Array, "K *stack R d_out"], weights: Float[Array, " K"]
) -> tuple[Float[Array, "*stack d_in KR"], Float[Array, "*stack KR d_out"]]:
    """Make factors of Σ_k w_k a_k b_k; clients that do not count are zero, whatever they hold."""
    counts = weights.reshape(-1, *[1] * (a.ndim - 1))
    left, right = jnp.where(counts == 0, 0, counts * a), jnp.where(counts == 0, 0, b)
    left = jnp.moveaxis(left, 0, -2)  # [*stack, d_in, K, R]
    right = jnp.moveaxis(right, 0, -3)  # [*stack, K, R, d_out]
    return left.reshape(*left.shape[:-2], -1), right.reshape(*right.shape[:-3], -1, right.shape[-1])


def deviations(
    a: Float[Array, "K *stack d_in R"], b: Float[Array, "K *stack R d_out"], weights: Float[Array, " K"]
) -> tuple[Float[Array, "*stack d_in KR"], Float[Array, "*stack KR d_out"]]:
    """Make factors of E = Σ p_k a_k b_k − ā b̄ = Σ p_k (a_k − ā)(b_k − b̄): what averaging the factors leaves out."""
    mean_a, mean_b = (tree.weighted_sum(x, weights) for x in (a, b))
    return side_by_side(a - mean_a, b - mean_b, weights)


def product_norms(a: Float[Array, "K *stack d_in R"], b: Float[Array, "K *stack R d_out"]) -> Float[Array, "K *stack"]:
    """Compute ‖a_k b_k‖_F from Gram matrices: ‖ab‖² = tr(aᵀa · bbᵀ)."""
    squared = jnp.sum(matmul(a.mT, a) * matmul(b, b.mT).mT, axis=(-2, -1))
    return jnp.sqrt(jnp.maximum(squared, 0))
