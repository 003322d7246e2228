"""Methods that are a share rule: what the rule names is averaged, everything else stays with its client.

Every client trains all of its adapter; θ_shared ← θ_shared + Σ_k p_k Δ_k. With Δ_k = θ_k − θ_shared and Σ p_k = 1 this
is the weighted mean of the clients' values, and it leaves the server as it is when nobody counts.
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fedvlm_jax import lora, tree
from fedvlm_jax.methods.record import Client, Context, Message, Method, Metrics, Personal, Server, Setup

__all__ = ["FACTORS", "FACTOR_B", "NOTHING", "make_share_method"]

NOTHING = lora.Rule(())
FACTORS = lora.Rule(r"(^|/)(a|b)$")
FACTOR_B = lora.Rule(r"(^|/)b$")


def make_share_method(name: str, source: str, rule: lora.Rule, setup: Setup) -> Method:
    """Build a method from a rule alone.

    State: the server holds `shared`, and `start`, the private part that newcomers begin with; a client holds `own`, its
    private part, and the state of its optimiser.
    """

    def init(adapter: lora.Adapter) -> Server:
        shared, own = lora.partition(adapter, rule, setup.sites)
        return {"shared": shared, "start": own}

    def init_client(key: PRNGKeyArray, server: Server) -> Personal:
        own = server["start"]
        if not setup.common_start:
            _, own = lora.partition(setup.draw(key), rule, setup.sites)
        return {"own": own, "optimizer": setup.start_optimizer(lora.combine(server["shared"], own))}

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        del key  # nothing here is random
        adapter = personalise(server, personal)
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(adapter)
        adapter, optimizer, metrics = ctx.train(adapter, optimizer, client)
        shared, own = lora.partition(adapter, rule, setup.sites)
        message = jax.tree.map(jnp.subtract, shared, server["shared"])
        metrics |= {"update_norm": _norm(message), "personal_drift": _drift(own, server["start"])}
        return {"own": own, "optimizer": optimizer}, message, metrics

    def aggregate(
        ctx: Context, server: Server, messages: Message, weights: Float[Array, " cohort"]
    ) -> tuple[Server, Metrics]:
        del ctx
        update = tree.weighted_sum(messages, weights)
        shared = jax.tree.map(jnp.add, server["shared"], update)
        return {**server, "shared": shared}, {"shared_norm": _norm(shared), "shared_update_norm": _norm(update)}

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        return lora.combine(server["shared"], personal["own"])

    def trained(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        return lora.combine(jax.tree.map(jnp.add, server["shared"], message), personal["own"])

    def download(server: Server) -> PyTree:
        return server["shared"]

    return Method(name, source, init, init_client, client_update, aggregate, personalise, trained, download)


def _norm(part: PyTree) -> Float[Array, ""]:
    leaves = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(part)]
    return jnp.sqrt(sum(leaves, start=jnp.float32(0)))


def _drift(own: PyTree, start: PyTree) -> Float[Array, ""]:
    """‖A_k − A_0‖ / ‖A_0‖ over the private factors A; 0 where none is private.

    A method whose private part hardly moves is another method under its name.
    """

    def only_a(part: PyTree) -> PyTree:
        return tree.partition(part, lambda path: re.search(r"(^|/)a(/|$)", path) is not None)[0]

    return _norm(jax.tree.map(jnp.subtract, only_a(own), only_a(start))) / jnp.maximum(_norm(only_a(start)), 1e-12)
