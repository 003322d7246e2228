"""The server's optimisers (arXiv 2003.00295, algorithm 2): the clients' average update is a pseudo-gradient.

    avg       θ ← θ + η Δ
    momentum  m ← β₁ m + Δ,             θ ← θ + η m
    adam      m ← β₁ m + (1 − β₁) Δ,    v ← β₂ v + (1 − β₂) Δ²,                θ ← θ + η m / (√v + τ)
    yogi      m as adam's,              v ← v − (1 − β₂) Δ² sign(v − Δ²)
    adagrad   m as adam's,              v ← v + Δ²

m starts at zero and v at τ², as in the paper; there is no bias correction, as in the paper.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax.methods.base import Held, Weights
from fedvlm_jax.methods.components.heterogeneous_ranks import keep_unsent
from fedvlm_jax.methods.config import ServerOptions
from fedvlm_jax.utils import tree

_SECOND: dict[str, Callable[[Array, Array, float], Array]] = {
    "adam": lambda v, squared, beta: beta * v + (1 - beta) * squared,
    "yogi": lambda v, squared, beta: v - (1 - beta) * squared * jnp.sign(v - squared),
    "adagrad": lambda v, squared, beta: v + squared,
}


def start(options: ServerOptions, shared: PyTree) -> PyTree:
    """Make the state of the optimiser that the options name."""
    if options.optimizer == "avg":
        return {}
    state = {"m": jax.tree.map(jnp.zeros_like, shared)}
    if options.optimizer in _SECOND:
        state["v"] = jax.tree.map(lambda leaf: jnp.full_like(leaf, options.epsilon**2), shared)
    return state


def step(
    options: ServerOptions, update: PyTree, state: PyTree, weights: Weights, held: Held | None
) -> tuple[PyTree, PyTree]:
    """Return what is added to the shared part, and the new state.

    Momentum moves nothing that nobody sent: leaves that the update lacks and directions that nobody has keep their
    state, and when nobody counts nothing moves.
    """
    second, rate = _SECOND.get(options.optimizer), options.learning_rate
    if options.optimizer == "avg":  # held or not: flexlora's step is from one basis to another, and half is neither
        return jax.tree.map(lambda leaf: rate * leaf, update), state
    flat = tree.flatten(update)

    def renew(part: PyTree, rule: Callable[[Array, Array], Array]) -> PyTree:
        leaves = tree.flatten(part).items()
        return tree.unflatten({path: rule(flat[path], leaf) if path in flat else leaf for path, leaf in leaves})

    gain = 1 - options.beta1 if second else 1.0
    new = {"m": renew(state["m"], lambda d, m: options.beta1 * m + gain * d)}
    if second is not None:
        new["v"] = renew(state["v"], lambda d, v: second(v, jnp.square(d), options.beta2))
    counts = weights.sum() > 0
    new = jax.tree.map(lambda after, before: jnp.where(counts, after, before), new, state)
    live = jnp.where(counts, rate, 0.0)  # what m remembers would move the server without anybody
    moved = {name: tree.partition(part, lambda path: path in flat)[0] for name, part in new.items()}
    if second is None:
        moves = jax.tree.map(lambda m: live * m, moved["m"])
    else:
        moves = jax.tree.map(lambda m, v: live * m / (jnp.sqrt(v) + options.epsilon), moved["m"], moved["v"])
    if held is None:
        return moves, new
    still = jax.tree.map(jnp.zeros_like, moves)
    return keep_unsent(moves, still, weights, held), keep_unsent(new, state, weights, held)
