"""Two adapters in one forward pass, and an adapter's factors apart from its scales."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora, tree
from fedvlm_jax.methods.record import is_factor

__all__ = ["cosines", "mix", "others_mean", "softmax_of_others", "split"]


def split(adapter: lora.Adapter) -> tuple[PyTree, PyTree]:
    """Factors, scales."""
    return tree.partition(adapter, is_factor)


def mix(first: PyTree, second: PyTree, scales: PyTree, weight: Array | float) -> lora.Adapter:
    """The adapter whose term is (1 − weight) times the first one's plus weight times the second one's."""
    parts = [
        tree.combine(factors, jax.tree.map(lambda scale, w=w: w * scale, scales))
        for factors, w in ((first, 1 - weight), (second, weight))
    ]
    return lora.concatenate(*parts)


def others_mean(values: PyTree, weights: Float[Array, " K"]) -> PyTree:
    """For each client the mean over the other clients that count [K, …]; nothing (zero) where there are none."""
    counts = (weights > 0).astype(jnp.float32)
    total = tree.weighted_sum(values, counts)

    def one(leaf: Array, sum_: Array) -> Array:
        mine = counts.reshape(-1, *[1] * (leaf.ndim - 1))
        others = counts.sum() - mine
        return jnp.where(others > 0, (sum_ - jnp.where(mine > 0, leaf, 0)) / jnp.maximum(others, 1), 0)

    return jax.tree.map(one, values, total)


def cosines(updates: PyTree, weights: Float[Array, " K"]) -> Float[Array, "K K"]:
    """Cosine similarity of the clients' updates, all leaves side by side; 0 with those who do not count."""
    rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(updates)], axis=1)
    rows = jnp.where((weights > 0)[:, None], rows, 0)
    unit = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return jnp.matmul(unit, unit.T, precision="highest")


def softmax_of_others(
    likeness: Float[Array, "K K"], weights: Float[Array, " K"], temperature: float, *, own: bool
) -> Float[Array, "K K"]:
    """Row k: the shares of the clients j in what k receives; 0 for who does not count, and for k itself unless `own`.

    A row in which nobody is left is all zero.
    """
    allowed = jnp.broadcast_to(weights > 0, likeness.shape)
    allowed = allowed if own else allowed & ~jnp.eye(len(weights), dtype=bool)
    scores = jnp.where(allowed, likeness / temperature, -jnp.inf)
    top = jnp.max(scores, axis=1, keepdims=True)
    raised = jnp.where(allowed, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    return raised / jnp.maximum(raised.sum(axis=1, keepdims=True), 1e-12)
