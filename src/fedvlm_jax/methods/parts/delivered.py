"""Methods in which every client gets something of its own from the others: an adapter it keeps and does not train.

A client holds its own adapter and what was delivered, both as factors. Its message is how far its own adapter went from
the start that all share, so that the values can be told from it; in a first round, or when nobody else counts, there is
nothing to deliver and what a client has stays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora, tree
from fedvlm_jax.methods.parts import pairs
from fedvlm_jax.methods.parts.norms import norm_of, personal_drift
from fedvlm_jax.methods.record import Client, Context, Message, Method, Metrics, Personal, Server, Setup, is_factor

__all__ = ["make_delivering_method"]

REFUSES: dict[str, str] = {
    **dict.fromkeys(
        ("server", "local.proximal", "local.scaffold"),
        "every client receives a mixture of its own: there is no one average to step or to stay near",
    ),
    "lora.ranks": "clients receive each other's factors, which must have the form of their own",
    "train.weighting": "what a client receives is weighed by similarity, or all others count alike",
}

Assemble = Callable[[PyTree, PyTree, PyTree], lora.Adapter]
Deliver = Callable[[PyTree, Message, Float[Array, " K"]], PyTree]


def make_delivering_method(
    name: str,
    source: str,
    setup: Setup,
    *,
    extend: Callable[[PyTree], PyTree] = lambda factors: factors,
    trained: Callable[[str], bool] = is_factor,
    sent: Callable[[str], bool] = is_factor,
    assemble: Assemble,
    deliver: Deliver,
    keep_own: bool = True,
    reads: tuple[str, ...] = (),
) -> Method:
    """Build one.

    Args:
        name, source: as in `Method`.
        setup: what it is made with.
        extend: (factors) -> the tree that a client trains, with a gate say.
        trained, sent: (path) -> is the leaf trained, is it in the message?
        assemble: (own tree, delivered, scales) -> the adapter.
        deliver: (start of what is sent, messages [K, …], weights [K]) -> what each client receives [K, …].
        keep_own: what is delivered stands beside the own adapter; else it takes the place of what was sent.
        reads: options of its own, `hyper.mix_temperature` say.
    """

    def init(adapter: lora.Adapter) -> Server:
        factors, scales = pairs.split(adapter)
        return {"start": extend(factors), "scales": scales}

    def init_client(key: PRNGKeyArray, server: Server, number: Int[Array, ""]) -> Personal:
        del number
        own = server["start"] if setup.common_start else extend(pairs.split(setup.draw(key))[0])
        nothing = jax.tree.map(jnp.zeros_like, _sent(server["start"]))
        return {"own": own, "delivered": nothing if keep_own else {}, "optimizer": setup.start_optimizer(own, trained)}

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        del key
        own = personal["own"]
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(own, trained)
        own, optimizer, metrics = ctx.train(
            own,
            optimizer,
            client,
            trained=trained,
            assemble=lambda factors: assemble(factors, personal["delivered"], server["scales"]),
        )
        message = jax.tree.map(jnp.subtract, _sent(own), _sent(server["start"]))
        metrics |= {"update_norm": norm_of(message), "personal_drift": personal_drift(own, server["start"])}
        return {**personal, "own": own, "optimizer": optimizer}, message, metrics

    def _sent(factors: PyTree) -> PyTree:
        return tree.partition(factors, sent)[0]

    def aggregate(
        ctx: Context, server: Server, messages: Message, weights: Float[Array, " K"]
    ) -> tuple[Server, Metrics]:
        del ctx
        return server, {"shared_update_norm": norm_of(tree.weighted_sum(messages, weights))}

    def hand_out(ctx: Context, server: Server, messages: Message, weights: Float[Array, " K"]) -> PyTree:
        del ctx
        others = (weights > 0).sum() > (1 if keep_own else 0)
        found = deliver(_sent(server["start"]), messages, weights)
        return {"tree": found, "there": jnp.broadcast_to(others, weights.shape)}

    def receive(personal: Personal, download: PyTree) -> Personal:
        there, found = download["there"], download["tree"]
        place = "delivered" if keep_own else "own"
        old = personal["delivered"] if keep_own else _sent(personal["own"])
        new = jax.tree.map(lambda after, before: jnp.where(there, after, before), found, old)
        if keep_own:
            return {**personal, place: new}
        return {**personal, place: tree.combine(new, tree.partition(personal["own"], sent)[1])}

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        return assemble(personal["own"], personal["delivered"], server["scales"])

    def trained_adapter(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        mine = jax.tree.map(jnp.add, _sent(server["start"]), message)
        own = tree.combine(mine, tree.partition(personal["own"], sent)[1])
        return assemble(own, personal["delivered"], server["scales"])

    def travels(server: Server, messages: Message) -> tuple[PyTree, PyTree]:
        del server
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), messages)
        return one, one

    return Method(
        name, source, init, init_client, client_update, aggregate, personalise, trained_adapter,
        download=lambda server: {}, deliver=hand_out, receive=receive, travels=travels,
        takes=frozenset(reads), refuses=REFUSES, moot=frozenset({"train.weighting"}),
    )  # fmt: skip
