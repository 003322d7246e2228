"""FedDPA (arXiv 2403.19211): a global adapter that is federated beside a local one that stays.

    y = x W_0 + (1 − α) s x A_g B_g + α s x A_l B_l

The local adapter is trained with the global one, as it was received, frozen beside it; then the global one, alone: the
order of the authors' code. Until a client has trained its local adapter it uses the global one as it is (α = 0). The
weight α is fixed here; the paper also adapts it to each question by similarity.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import (
    Aggregated,
    Client,
    Context,
    Key,
    Message,
    Method,
    Number,
    Personal,
    Server,
    Setup,
    Updated,
    Weights,
    both_ways,
    one_phase,
)
from fedvlm_jax.methods.components import mixing
from fedvlm_jax.methods.components.norms import norm_of
from fedvlm_jax.utils import tree

REFUSES: dict[str, str] = {
    **dict.fromkeys(
        ("server", "local.proximal", "local.scaffold"), "its global adapter is averaged plainly, as the paper has it"
    ),
    "lora.ranks": "the paper's two adapters have one rank for all, and so have these",
}


def make_dual_method(
    name: str,
    source: str,
    setup: Setup,
    alpha: float,
    *,
    stages: Callable[[int, Client], tuple[Client | None, Client | None]],
    phase: Callable[[int], int] = one_phase,
) -> Method:
    """Make a FedDPA.

    Args:
        name, source: as in `Method`.
        setup: as in every method.
        alpha: weight of the local adapter.
        stages: (phase, client) -> the client with the steps that train the local adapter, and with those that train the
            global one.
        phase: as in `Method`.
    """

    def init(adapter: lora.Adapter) -> Server:
        factors, scales = mixing.split(adapter)
        return {"shared": factors, "start": factors, "scales": scales}

    def init_client(key: Key, server: Server, number: Number) -> Personal:
        del number
        own = server["start"] if setup.common_start else mixing.split(setup.draw(key))[0]
        state = {"own": own, "begun": jnp.zeros((), bool)}
        return state | setup.kept(_start_optimizers(own))

    def _start_optimizers(own: PyTree) -> dict[str, PyTree]:
        return dict.fromkeys(("global", "local"), setup.start_optimizer(own))

    def client_update(ctx: Context, server: Server, personal: Personal, client: Client, key: Key) -> Updated:
        del key
        shared, own = server["shared"], personal["own"]
        optimizers = dict(personal["optimizer"]) if setup.keep_optimizer else _start_optimizers(own)
        message, metrics, begun = {}, {}, personal["begun"]
        of_local, of_global = stages(ctx.phase, client)
        if of_local is not None:
            own, optimizers["local"], metrics = ctx.train(
                own,
                optimizers["local"],
                of_local,
                assemble=lambda factors: mixing.mix(shared, factors, server["scales"], alpha),
            )
            begun = begun | of_local.mask.any()
        if of_global is not None:
            trained, optimizers["global"], more = ctx.train(
                shared,
                optimizers["global"],
                of_global,
                assemble=lambda factors: tree.combine(factors, server["scales"]),
            )
            message = jax.tree.map(jnp.subtract, trained, shared)
            local = metrics.get("steps", 0)  # the loss is the local pair's, unless it took no step
            metrics = {name: jnp.where(local > 0, metrics.get(name, x), x) for name, x in more.items()}
            metrics["steps"] = more["steps"] + local
        metrics |= {"update_norm": norm_of(message)}
        return {"own": own, "begun": begun, **setup.kept(optimizers)}, message, metrics

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> Aggregated:
        del ctx
        update = tree.weighted_sum(messages, weights)
        shared = jax.tree.map(jnp.add, server["shared"], update) if update else server["shared"]
        return {**server, "shared": shared}, {"shared_norm": norm_of(shared), "shared_update_norm": norm_of(update)}

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        weight = jnp.where(personal["begun"], alpha, 0.0)
        return mixing.mix(server["shared"], personal["own"], server["scales"], weight)

    def trained(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        shared = jax.tree.map(jnp.add, server["shared"], message) if message else server["shared"]
        return personalise({**server, "shared": shared}, personal)

    return Method(
        name=name, source=source, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate,
        personalise=personalise, trained=trained, download=lambda server: server["shared"], phase=phase,
        travels=both_ways, pairs=2, refuses=REFUSES,
    )  # fmt: skip
