"""FLoRA (arXiv 2409.05976): the clients' factors are stacked, which adds their updates exactly; the sum joins the base.

LoRA starts anew in every round: each client draws an A of its own, B is zero.
"""

from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import (
    Aggregated,
    Client,
    Context,
    Key,
    Method,
    Setup,
    Updated,
    Weights,
    broadcast_parts,
    shape_of_one,
)
from fedvlm_jax.methods.components import base_updates
from fedvlm_jax.methods.components.factors import map_sites, norm_of, side_by_side, split_scales
from fedvlm_jax.methods.components.heterogeneous_ranks import with_ranks
from fedvlm_jax.utils import tree


def make(setup: Setup) -> Method:
    """Make flora: the server holds the factors' form and what was added to the base, a client nothing."""

    def init(adapter: lora.Adapter) -> PyTree:
        return {"start": adapter, "base": base_updates.start(adapter, setup.places, setup.rounds)}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        factors = tree.combine(split_scales(setup.draw(key))[0], split_scales(server["start"])[1])
        factors, _, metrics = ctx.train(factors, setup.start_optimizer(factors), client)
        message, _ = split_scales(factors)
        return personal, message, metrics | {"update_norm": norm_of(message)}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        def stack(site: dict[str, Array]) -> dict[str, Array]:
            left, right = side_by_side(site["a"], site["b"], weights)
            return {"left": left, "right": right}

        deltas = base_updates.add(server["base"], map_sites(stack, messages), server["start"], ctx.round)
        return {**server, "base": deltas}, {"shared_norm": norm_of(deltas)}

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        del personal
        return tree.combine(message, split_scales(server["start"])[1])

    no_average = "factors are stacked and start anew in every round: there is no average that a next round goes on from"
    method = Method(
        name="flora", source="arXiv 2409.05976: W_0 ← W_0 + s Σ p_k B_k A_k by stacking, then LoRA starts anew",
        init=init, init_client=lambda key, server, number: {}, client_update=client_update, aggregate=aggregate,
        personalise=lambda server, personal: server["start"],  # its b is zero: what was learned is in the base
        trained=trained, download=lambda server: server["base"],
        broadcast=broadcast_parts("base"),
        base=lambda params, server: base_updates.apply(params, server["base"]),
        travels=lambda server, messages: (shape_of_one(messages), messages),  # everybody receives all factors
        refuses={
            **dict.fromkeys(("server", "local.proximal", "local.scaffold"), no_average),
            "start": "its clients draw fresh factors in every round; merge the adapter into the base instead",
        },
    )  # fmt: skip
    return with_ranks(method, setup.ranks, send_rank=False)
