"""Ditto (arXiv 2012.04221): beside the federated model each client trains one of its own, pulled towards it.

The personal model takes as many steps as the global one, so a round costs twice that of fedavg-lora.
"""

from jaxtyping import Array, Int, PRNGKeyArray

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, Context, Message, Method, Metrics, Personal, Server, Setup
from fedvlm_jax.methods.components import client_regularizers, mixing
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method

__all__ = ["make"]

SOURCE = "arXiv 2012.04221: w by FedAvg; v_k ← v_k − η(∇F_k(v_k) + λ(v_k − w)), v_k is what the client uses"


def make(setup: Setup) -> Method:
    """ditto: fedavg-lora with a second model per client."""
    federated = make_share_method("ditto", SOURCE, FACTORS, setup, Parts(reads=("hyper.ditto_lambda",)))

    def init_client(key: PRNGKeyArray, server: Server, number: Int[Array, ""]) -> Personal:
        state = federated.init_client(key, server, number)
        own = federated.personalise(server, state)
        return {"federated": state, "own": own, **setup.kept(setup.start_optimizer(own))}

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        anchor = mixing.split(federated.personalise(server, personal["federated"]))[0]
        state, message, metrics = federated.client_update(ctx, server, personal["federated"], client, key)
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(personal["own"])
        own, optimizer, mine = ctx.train(
            personal["own"],
            optimizer,
            client,
            nudge=client_regularizers.make_proximal(setup.hyper.ditto_lambda, anchor),
        )
        metrics |= {"loss": mine["loss"], "last_loss": mine["last_loss"], "global_loss": metrics["loss"]}
        return {"federated": state, "own": own, **setup.kept(optimizer)}, message, metrics

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        del server
        return personal["own"]

    def trained(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        del server, message
        return personal["own"]

    return federated._replace(
        init_client=init_client, client_update=client_update, personalise=personalise, trained=trained
    )
