"""FLoRA (arXiv 2409.05976): the clients' factors are stacked, which adds their updates exactly; the sum joins the base.

LoRA starts anew in every round: each client draws an A of its own, B is zero.
"""

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
    Travelling,
    Updated,
    Weights,
    is_factor,
    shape_of_one,
)
from fedvlm_jax.methods.components import base_updates
from fedvlm_jax.methods.components.heterogeneous_ranks import with_ranks
from fedvlm_jax.methods.components.low_rank import by_site, side_by_side
from fedvlm_jax.methods.components.norms import norm_of, only
from fedvlm_jax.utils import tree

SOURCE = "arXiv 2409.05976: W_0 ← W_0 + s Σ p_k B_k A_k by stacking, then LoRA starts anew"
_NO_AVERAGE = "factors are stacked and start anew in every round: there is no average that a next round goes on from"
REFUSES: dict[str, str] = dict.fromkeys(("server", "local.proximal", "local.scaffold"), _NO_AVERAGE)


def make(setup: Setup) -> Method:
    """Make flora: the server holds the factors' form and what was added to the base, a client nothing."""

    def init(adapter: lora.Adapter) -> Server:
        rank = setup.places * next(iter(by_site(adapter).values()))["a"].shape[-1]
        return {"start": adapter, "base": base_updates.start(adapter, rank, setup.rounds)}

    def init_client(key: Key, server: Server, number: Number) -> Personal:
        del key, server, number
        return {}

    def client_update(ctx: Context, server: Server, personal: Personal, client: Client, key: Key) -> Updated:
        scales = tree.partition(server["start"], only("scale"))[0]
        factors = tree.combine(tree.partition(setup.draw(key), is_factor)[0], scales)
        factors, _, metrics = ctx.train(factors, setup.start_optimizer(factors), client)
        message = tree.partition(factors, is_factor)[0]
        return personal, message, metrics | {"update_norm": norm_of(message)}

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> Aggregated:
        scales, stacked = by_site(server["start"]), {}
        for path, site in by_site(messages).items():
            left, right = side_by_side(site["a"], site["b"], weights)
            stacked[path] = (left * scales[path]["scale"][..., None, None], right)
        deltas = base_updates.add(server["base"], stacked, ctx.round)
        return {**server, "base": deltas}, {"shared_norm": norm_of(deltas)}

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        del personal
        return server["start"]  # its b is zero: what was learned is in the base

    def trained(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        del personal
        return tree.combine(message, tree.partition(server["start"], only("scale"))[0])

    def travels(server: Server, messages: Message) -> Travelling:
        del server
        return shape_of_one(messages), messages

    method = Method(
        name="flora", source=SOURCE, init=init, init_client=init_client, client_update=client_update,
        aggregate=aggregate, personalise=personalise, trained=trained, download=lambda server: server["base"],
        base=lambda params, server: base_updates.apply(params, server["base"]), travels=travels,
        refuses=REFUSES,
    )  # fmt: skip
    return with_ranks(method, setup.ranks, tell=False)
