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
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Aggregated, Client, Context, Key, Method, Metrics, Number, Updated, Weights
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.utils import tree

Nudge = Callable[[PyTree], PyTree]


def make_proximal(strength: float, anchor: PyTree) -> Nudge:
    """Make the nudge strength · (θ − anchor) for the leaves that are in both.

    >>> make_proximal(0.5, {"b": 2.0, "scale": 1.0})({"b": 4.0})
    {'b': 1.0}
    """

    def nudge(factors: PyTree) -> PyTree:
        flat = tree.flatten(anchor)
        return tree.unflatten({path: strength * (x - flat[path]) for path, x in tree.flatten(factors).items()})

    return nudge


def with_proximal(method: Method, strength: float) -> Method:
    """Pull a client's shared factors towards the server's (FedProx) in a method that says how to `split` factors."""

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        ctx = _hold_back(ctx, method, lambda received: make_proximal(strength, received))
        return method.client_update(ctx, server=server, personal=personal, client=client, key=key)

    return replace(method, client_update=client_update)


def with_scaffold(method: Method) -> Method:
    """Correct a client's gradients by control variates (SCAFFOLD) in a method that says how to `split` factors.

    Server and clients hold c and c_k as `control`, of the form of `download`; both travel beside what travels anyway.
    """

    def start(server: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, method.download(server=server))

    def init(adapter: lora.Adapter) -> PyTree:
        server = method.init(adapter=adapter)
        return {**server, "control": start(server)}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        return {**method.init_client(key=key, server=server, number=number), "control": start(server)}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        before, steps = tree.flatten(personal["control"]), client.mask.any(axis=1).sum()
        correction = jax.tree.map(jnp.subtract, server["control"], personal["control"])
        held_back = _hold_back(ctx, method, lambda received: lambda shared: correction)
        state, update, metrics = method.client_update(
            held_back, server=server, personal=personal, client=client, key=key
        )
        moved = tree.flatten(update)

        def renew(path: str, c: Array) -> Array:
            if path not in moved:  # the round did not train it
                return before[path]
            rate = ctx.rates["a" if leaf_name(path) == "a" else "b"]
            new = before[path] - c - moved[path] / jnp.maximum(steps * rate, 1e-12)
            return jnp.where(steps > 0, new, before[path])

        control = tree.unflatten({path: renew(path, c) for path, c in tree.flatten(server["control"]).items()})
        step = jax.tree.map(lambda new, old: client.share * (new - old), control, personal["control"])
        return {**state, "control": control}, {"update": update, "control": step}, metrics

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        new, health = method.aggregate(ctx, server=server, messages=messages["update"], weights=weights)
        # Each step is already weighted by its client's share, so here everyone who counts counts once.
        step = tree.weighted_sum(messages["control"], (weights > 0).astype(jnp.float32))
        return {**new, "control": jax.tree.map(jnp.add, server["control"], step)}, health

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        return method.trained(server=server, personal=personal, message=message["update"])

    def download(server: PyTree) -> PyTree:
        return {**method.download(server=server), "control": server["control"]}

    def broadcast(server: PyTree, number: Number, last: PyTree | None) -> PyTree:
        received = method.broadcast(server=server, number=number, last=None if last is None else last["update"])
        return {**received, "control": server["control"]}

    return replace(
        method, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate, trained=trained,
        download=download, broadcast=broadcast, split=None,  # a message is more than the update
        linear=False,  # who counts counts once for the control variates
    )  # fmt: skip


def _hold_back(ctx: Context, method: Method, make: Callable[[PyTree], Nudge]) -> Context:
    """Add a nudge to the gradient of what a method shares: `make` makes it of the shared factors before a training."""
    split = method.split
    assert split is not None, f"{method.name} does not tell which of its factors are shared"

    def train(factors: PyTree, optimizer: PyTree, client: Client, **choices: Any) -> tuple[PyTree, PyTree, Metrics]:
        extra, others = make(split(factors)[0]), choices.pop("nudge", None)

        def nudge(moving: PyTree) -> PyTree:
            paths = tree.flatten(moving).keys()
            # Split with what is frozen: a round may train nothing of what is shared.
            shared, private = split(tree.unflatten(tree.flatten(factors) | tree.flatten(moving)))
            total = lora.combine(extra(shared), jax.tree.map(jnp.zeros_like, private))
            total = tree.partition(total, lambda path: path in paths)[0]
            return total if others is None else jax.tree.map(jnp.add, others(moving), total)

        return ctx.train(factors, optimizer, client, **choices, nudge=nudge)

    return ctx._replace(train=train)
