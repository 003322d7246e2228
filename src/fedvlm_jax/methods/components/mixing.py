"""Two adapters in one forward pass, and an adapter's factors apart from its scales."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import is_factor
from fedvlm_jax.utils import tree


def split(adapter: lora.Adapter) -> tuple[PyTree, PyTree]:
    """Split an adapter into factors and scales."""
    return tree.partition(adapter, is_factor)


def mix(first: PyTree, second: PyTree, scales: PyTree, weight: Array | float) -> lora.Adapter:
    """Make the adapter whose term is (1 − weight) times the first one's plus weight times the second one's.

    The weight has no gradient: it goes into the scales.
    """
    parts = [
        tree.combine(factors, jax.tree.map(lambda scale, w=w: w * scale, scales))
        for factors, w in ((first, 1 - weight), (second, weight))
    ]
    return lora.concatenate(*parts)


def cosines(one: PyTree, several: PyTree) -> Float[Array, " P"]:
    """Compute a tree's cosine similarity with each of several [P, …], all leaves side by side; 0 with what is zero."""
    leaves = list(zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True))
    products = sum(jnp.einsum("...,p...->p", x, each, precision="highest") for x, each in leaves)
    squares = sum(jnp.einsum("p...,p...->p", each, each, precision="highest") for _, each in leaves)
    mine = sum(jnp.sum(jnp.square(x)) for x, _ in leaves)
    return products / jnp.maximum(jnp.sqrt(squares * mine), 1e-12)


def softmax_among(scores: Float[Array, " P"], allowed: Bool[Array, " P"]) -> Float[Array, " P"]:
    """Compute the softmax of the scores that are allowed; 0 for the others, and for all where none is."""
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores)
    raised = jnp.where(allowed, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    return raised / jnp.maximum(raised.sum(), 1e-12)
