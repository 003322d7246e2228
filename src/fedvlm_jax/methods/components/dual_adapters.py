"""A global adapter that is federated beside a local one that stays: y = x W_0 + (1 − α) s x A_g B_g + α s x A_l B_l.

Until a client has trained its local adapter it uses the global one as it is (α = 0).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import Aggregated, Client, Context, Key, Method, Metrics, Number, Setup, Updated, Weights
from fedvlm_jax.methods.components.factors import mix, norm_of, split_scales
from fedvlm_jax.utils import tree


class Pairs(NamedTuple):
    """A client's two adapters before its training.

    Attributes:
        received: the global factors.
        own: the local ones.
        scales: of both.
        optimizers: their states, `global` and `local`.
    """

    received: PyTree
    own: PyTree
    scales: PyTree
    optimizers: dict[str, PyTree]


class PairsTrained(NamedTuple):
    """A client's two adapters after its training.

    Attributes:
        own: the local factors.
        message: how far the global ones went; empty where nothing is sent.
        optimizers: their states.
        begun: whether the local factors took a step.
        metrics: of both trainings.
    """

    own: PyTree
    message: PyTree
    optimizers: dict[str, PyTree]
    begun: Bool[Array, ""] | bool
    metrics: Metrics


TrainPairs = Callable[[Context, Pairs, Client], PairsTrained]


def make_dual_method(
    name: str,
    source: str,
    setup: Setup,
    alpha: float,
    *,
    train: TrainPairs,
    phase: Callable[[int], int] = lambda round_: 0,
    unreached: str = "",
) -> Method:
    """Make a method of two adapters in which the local one has the weight `alpha`.

    `train` is one client's training of both in a round; the rest is as in `Method`.
    """

    def start_optimizers(own: PyTree) -> dict[str, PyTree]:
        return dict.fromkeys(("global", "local"), setup.start_optimizer(own))

    def init(adapter: lora.Adapter) -> PyTree:
        factors, scales = split_scales(adapter)
        return {"shared": factors, "start": factors, "scales": scales}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        own = server["start"] if setup.common_start else split_scales(setup.draw(key))[0]
        return {"own": own, "begun": jnp.zeros((), bool), **setup.kept(start_optimizers(own))}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        own = personal["own"]
        optimizers = dict(personal["optimizer"]) if setup.keep_optimizer else start_optimizers(own)
        made = train(ctx, Pairs(server["shared"], own, server["scales"], optimizers), client)
        metrics = made.metrics | {"update_norm": norm_of(made.message)}
        begun = personal["begun"] | made.begun
        return {"own": made.own, "begun": begun, **setup.kept(made.optimizers)}, made.message, metrics

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        del ctx
        update = tree.weighted_sum(messages, weights)
        shared = jax.tree.map(jnp.add, server["shared"], update) if update else server["shared"]
        return {**server, "shared": shared}, {"shared_norm": norm_of(shared), "shared_update_norm": norm_of(update)}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        weight = jnp.where(personal["begun"], alpha, 0.0)
        return mix(server["shared"], personal["own"], server["scales"], weight)

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        shared = jax.tree.map(jnp.add, server["shared"], message) if message else server["shared"]
        return personalise({**server, "shared": shared}, personal)

    plain = "its global adapter is averaged plainly, as the paper has it"
    ranks = "the paper's two adapters have one rank for all, and so have these"
    return Method(
        name=name, source=source, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate,
        personalise=personalise, trained=trained, download=lambda server: server["shared"], phase=phase,
        broadcast=base.broadcast_parts("shared"), linear=True,
        travels=lambda server, messages: (base.shape_of_one(messages), base.shape_of_one(messages)), pairs=2,
        unreached=unreached,
        refuses={"server": plain, "local.proximal": plain, "local.scaffold": plain, "lora.ranks": ranks},
    )  # fmt: skip
