"""FLoRA (arXiv 2409.05976): the clients' factors are stacked, which adds their updates exactly; the sum joins the base.

LoRA starts anew in every round: each client draws an A of its own, B is zero.
"""

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, Context, Message, Method, Metrics, Personal, Server, Setup, is_factor
from fedvlm_jax.methods.components import base_updates, heterogeneous_ranks
from fedvlm_jax.methods.components.low_rank import by_site, side_by_side
from fedvlm_jax.methods.components.norms import norm_of, only
from fedvlm_jax.utils import tree

__all__ = ["make"]

SOURCE = "arXiv 2409.05976: W_0 ← W_0 + s Σ p_k B_k A_k by stacking, then LoRA starts anew"
_NO_AVERAGE = "factors are stacked and start anew in every round: there is no average that a next round goes on from"
REFUSES: dict[str, str] = dict.fromkeys(("server", "local.proximal", "local.scaffold"), _NO_AVERAGE)


def make(setup: Setup) -> Method:
    """flora. The server holds the factors' form and what was added to the base; a client keeps nothing but its rank."""

    def init(adapter: lora.Adapter) -> Server:
        rank = setup.places * next(iter(by_site(adapter).values()))["a"].shape[-1]
        return {"start": adapter, "base": base_updates.start(adapter, rank, setup.rounds)}

    def init_client(key: PRNGKeyArray, server: Server, number: Int[Array, ""]) -> Personal:
        del key, server
        return {"rank": heterogeneous_ranks.of(setup, number)} if setup.ranks else {}

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        scales = tree.partition(server["start"], only("scale"))[0]
        factors = tree.combine(tree.partition(setup.draw(key), is_factor)[0], scales)
        if setup.ranks:
            factors = heterogeneous_ranks.cut(factors, personal["rank"])
        factors, _, metrics = ctx.train(factors, setup.start_optimizer(factors), client)
        message = tree.partition(factors, is_factor)[0]
        return personal, message, metrics | {"update_norm": norm_of(message)}

    def aggregate(
        ctx: Context, server: Server, messages: Message, weights: Float[Array, " cohort"]
    ) -> tuple[Server, Metrics]:
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

    def travels(server: Server, messages: Message) -> tuple[PyTree, PyTree]:
        del server
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), messages), messages

    return Method(
        "flora", SOURCE, init, init_client, client_update, aggregate, personalise, trained,
        download=lambda server: server["base"],
        base=lambda params, server: base_updates.apply(params, server["base"]),
        travels=travels, takes=frozenset({"lora.ranks"}), refuses=REFUSES,
    )  # fmt: skip
