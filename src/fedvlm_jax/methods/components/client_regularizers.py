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

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import (
    Aggregated,
    Client,
    Context,
    Key,
    Message,
    Method,
    Metrics,
    Number,
    Personal,
    Server,
    Train,
    Updated,
    Weights,
)
from fedvlm_jax.methods.components.norms import leaf_name
from fedvlm_jax.utils import tree

Nudge = Callable[[PyTree], PyTree]


def make_proximal(strength: float, anchor: PyTree) -> Nudge:
    """Make the nudge strength · (θ − anchor) for the leaves that there are of both."""

    def nudge(factors: PyTree) -> PyTree:
        flat = tree.flatten(anchor)
        return tree.unflatten({path: strength * (x - flat[path]) for path, x in tree.flatten(factors).items()})

    return nudge


def with_proximal(method: Method, strength: float) -> Method:
    """Pull a client's shared factors towards the server's (FedProx) in a method that tells how to `split` factors."""

    def client_update(ctx: Context, server: Server, personal: Personal, client: Client, key: Key) -> Updated:
        train = _hold_back(ctx.train, method, lambda received: make_proximal(strength, received))
        return method.client_update(ctx._replace(train=train), server=server, personal=personal, client=client, key=key)

    return replace(method, client_update=client_update)


def with_scaffold(method: Method) -> Method:
    """Correct a client's gradients by control variates (SCAFFOLD) in a method that tells how to `split` factors.

    Server and clients hold c and c_k as `control`, of the form of `download`; both travel beside what travels anyway.
    """

    def start(server: Server) -> PyTree:
        return jax.tree.map(jnp.zeros_like, method.download(server=server))

    def init(adapter: lora.Adapter) -> Server:
        server = method.init(adapter=adapter)
        return {**server, "control": start(server)}

    def init_client(key: Key, server: Server, number: Number) -> Personal:
        return {**method.init_client(key=key, server=server, number=number), "control": start(server)}

    def client_update(ctx: Context, server: Server, personal: Personal, client: Client, key: Key) -> Updated:
        c, c_k = server["control"], personal["control"]
        correction = jax.tree.map(jnp.subtract, c, c_k)
        train = _hold_back(ctx.train, method, lambda received: lambda shared: correction)
        state, update, metrics = method.client_update(
            ctx._replace(train=train), server=server, personal=personal, client=client, key=key
        )
        new = _renew(c, c_k, update, client, ctx.rates)
        moved = jax.tree.map(lambda after, before: client.share * (after - before), new, c_k)
        return {**state, "control": new}, {"update": update, "control": moved}, metrics

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> Aggregated:
        new, health = method.aggregate(ctx, server=server, messages=messages["update"], weights=weights)
        step = tree.weighted_sum(messages["control"], (weights > 0).astype(jnp.float32))
        return {**new, "control": jax.tree.map(jnp.add, server["control"], step)}, health

    def trained(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        return method.trained(server=server, personal=personal, message=message["update"])

    def download(server: Server) -> PyTree:
        return {**method.download(server=server), "control": server["control"]}

    return replace(
        method, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate, trained=trained,
        download=download,
    )  # fmt: skip


def _hold_back(train: Train, method: Method, make: Callable[[PyTree], Nudge]) -> Callable[..., Any]:
    """Local training that adds a nudge to the gradient of what is shared; the rest is left alone.

    Args:
        train: that of the context.
        method: tells what is shared.
        make: (shared factors before the training) -> their nudge.
    """
    split = method.split
    assert split is not None, f"{method.name} does not tell which of its factors are shared"

    def train_with_nudge(
        factors: PyTree, optimizer: PyTree, client: Client, **choices: Any
    ) -> tuple[PyTree, PyTree, Metrics]:
        extra, others = make(split(factors)[0]), choices.pop("nudge", None)

        def nudge(moving: PyTree) -> PyTree:
            paths = tree.flatten(moving).keys()
            # Split with what is frozen: a round may train nothing of what is shared.
            shared, own = split(tree.unflatten(tree.flatten(factors) | tree.flatten(moving)))
            total = lora.combine(extra(shared), jax.tree.map(jnp.zeros_like, own))
            total = tree.partition(total, lambda path: path in paths)[0]
            return total if others is None else jax.tree.map(jnp.add, others(moving), total)

        return train(factors, optimizer, client, **choices, nudge=nudge)

    return train_with_nudge


def _renew(control: PyTree, own: PyTree, update: PyTree, client: Client, rates: dict[str, Float[Array, ""]]) -> PyTree:
    """Return c_k⁺ (option II); a client without a step keeps c_k, and so does a leaf that was not trained."""
    steps = client.mask.any(axis=1).sum()
    moved, mine = tree.flatten(update), tree.flatten(own)

    def renew_leaf(path: str, c: Array) -> Array:
        if path not in moved:
            return mine[path]
        rate = rates["a" if leaf_name(path) == "a" else "b"]
        new = mine[path] - c - moved[path] / jnp.maximum(steps * rate, 1e-12)
        return jnp.where(steps > 0, new, mine[path])

    return tree.unflatten({path: renew_leaf(path, c) for path, c in tree.flatten(control).items()})
