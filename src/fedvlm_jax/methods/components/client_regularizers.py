"""Terms that hold a client's shared factors back: FedProx's proximal term and SCAFFOLD's control variates.

Both are additions to the gradient: μ(θ − θ_server) is the gradient of μ/2 ‖θ − θ_server‖² (arXiv 1812.06127), and
c − c_k is SCAFFOLD's correction (arXiv 1910.06378, equation 3), with option II for the new c_k,

    c_k⁺ = c_k − c + (θ_server − θ_k) / Σ_s η_s,        c ← c + Σ_{k in the cohort} q_k (c_k⁺ − c_k),

in which Σ_s η_s is the steps that counted times the rate of the factor. That is an estimate of the client's gradient
only if a step is rate times gradient, so it asks for plain gradient descent.

q_k is the client's share of all clients' weight, whoever is in the cohort, so that c = Σ q_k c_k at all times; the
clients are those that can be drawn. In the paper all count alike, q_k = 1/N. Where the average weighs clients by their
examples, or draws them by size, c has to weigh them so too: else its fixed point is that of another objective than the
average's, Σ q_k F_k.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client
from fedvlm_jax.methods.components.norms import leaf_name
from fedvlm_jax.utils import tree

__all__ = ["average", "make_correction", "make_nudge", "make_proximal", "renew", "start"]

Nudge = Callable[[PyTree], PyTree]


def make_proximal(strength: float, anchor: PyTree) -> Nudge:
    """strength · (θ − anchor), for the leaves that there are of both."""

    def nudge(factors: PyTree) -> PyTree:
        flat = tree.flatten(anchor)
        return tree.unflatten({path: strength * (x - flat[path]) for path, x in tree.flatten(factors).items()})

    return nudge


def make_correction(control: PyTree, own: PyTree) -> Nudge:
    """c − c_k."""

    def nudge(factors: PyTree) -> PyTree:
        paths = tree.flatten(factors).keys()
        return tree.partition(jax.tree.map(jnp.subtract, control, own), lambda path: path in paths)[0]

    return nudge


def make_nudge(nudges: Sequence[Nudge], rule: lora.Rule, sites: lora.Sites) -> Nudge:
    """The sum of nudges on the shared factors; private ones are left alone."""

    def nudge(factors: PyTree) -> PyTree:
        shared, own = lora.partition(factors, rule, sites)
        parts = [each(shared) for each in nudges]
        total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        return lora.combine(total, jax.tree.map(jnp.zeros_like, own))

    return nudge


def start(shared: PyTree) -> PyTree:
    """Control variates begin at zero."""
    return jax.tree.map(jnp.zeros_like, shared)


def renew(
    control: PyTree, own: PyTree, update: PyTree, client: Client, rates: dict[str, Float[Array, ""]]
) -> tuple[PyTree, PyTree]:
    """-> c_k⁺, and q_k (c_k⁺ − c_k), its part of what moves c; a client without a step keeps its own."""
    steps = client.mask.any(axis=1).sum()
    moved = tree.flatten(update)

    def one(path: str, c: Array, c_k: Array) -> Array:
        if path not in moved:
            return c_k
        rate = rates["a" if leaf_name(path) == "a" else "b"]
        new = c_k - c - moved[path] / jnp.maximum(steps * rate, 1e-12)
        return jnp.where(steps > 0, new, c_k)

    flat, mine = tree.flatten(control), tree.flatten(own)
    new = tree.unflatten({path: one(path, flat[path], mine[path]) for path in flat})
    return new, jax.tree.map(lambda after, before: client.share * (after - before), new, own)


def average(control: PyTree, moved: PyTree, weights: Float[Array, " cohort"]) -> PyTree:
    """c plus the parts of those who count."""
    step = tree.weighted_sum(moved, (weights > 0).astype(jnp.float32))
    return jax.tree.map(jnp.add, control, step)
