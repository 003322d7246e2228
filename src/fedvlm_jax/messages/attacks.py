"""Simulated hostile clients: who they are, and what they make of the messages that they send.

    sign-flip   the update with its sign turned
    scale       the update a hundred times as large (a model replacement, arXiv 1807.00459)
    noise       Gaussian noise of the update's norm
    label-flip  training on wrong answers, see `federation/inputs/poisoned_rows.py`
    backdoor    training a fixed answer to pictures with a mark, see there too

The first three need nothing of a method but that it sends something. A hostile client trains and keeps its state like
any other; what it sends is changed after that, and before the message is looked at for numbers that are not finite.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from fedvlm_jax.messages.config import Attack
from fedvlm_jax.methods.base import Client, Context, Key, Method, Updated
from fedvlm_jax.methods.components.factors import norm_of
from fedvlm_jax.utils.random_streams import Stream

OF_MESSAGES = ("sign-flip", "scale", "noise")
"""The attacks that change what a client sends; the others change what it trains on."""
FACTOR = 100.0
"""How much larger `scale` makes an update."""


def draw_attackers(seed: int, clients: Int[np.ndarray, " some"], count: int) -> tuple[int, ...]:
    """Draw the hostile ones of these clients, in ascending order: by the seed, the same for all methods and attacks.

    >>> draw_attackers(0, np.arange(16), 2)
    (4, 10)
    """
    drawn = np.random.default_rng([Stream.ATTACKERS, seed]).choice(clients, count, replace=False)
    return tuple(sorted(drawn.tolist()))


def with_attack(method: Method, attack: Attack) -> Method:
    """Have the clients of which `Client.hostile` is true send what the attack makes of their messages."""
    if attack not in OF_MESSAGES:
        return method

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        state, message, metrics = method.client_update(ctx, server=server, personal=personal, client=client, key=key)
        hostile = client.hostile
        if hostile is None:  # nobody is, in a plan say
            return state, message, metrics
        sent = _change(message, attack, jax.random.fold_in(key, Stream.HOSTILE_NOISE))
        return state, jax.tree.map(lambda x, y: jnp.where(hostile, x, y), sent, message), metrics

    return replace(method, client_update=client_update)


def _change(message: PyTree, attack: Attack, key: Key) -> PyTree:
    """Make what is sent; what is no real number, such as a rank, stays."""
    leaves, structure = jax.tree.flatten(message)
    real = [place for place, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if attack == "noise":
        keys = jax.random.split(key, max(len(real), 1))
        drawn = [jax.random.normal(keys[n], leaves[at].shape, leaves[at].dtype) for n, at in enumerate(real)]
        factor = norm_of([leaves[at] for at in real]) / jnp.maximum(norm_of(drawn), 1e-30)
    else:
        drawn, factor = [leaves[at] for at in real], FACTOR if attack == "scale" else -1.0
    for at, leaf in zip(real, drawn, strict=True):
        leaves[at] = (factor * leaf).astype(leaf.dtype)
    return jax.tree.unflatten(structure, leaves)
