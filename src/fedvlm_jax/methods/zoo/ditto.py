"""Ditto (arXiv 2012.04221): beside the federated model each client trains one of its own, pulled towards it.

The personal model takes as many steps as the global one, so a round costs twice that of fedavg-lora.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from jaxtyping import PyTree

from fedvlm_jax.methods.base import Client, Context, Key, Method, MethodOptions, Setup, Updated
from fedvlm_jax.methods.components.client_regularizers import make_proximal
from fedvlm_jax.methods.components.factors import split_scales
from fedvlm_jax.methods.components.personal_model import with_personal_model
from fedvlm_jax.methods.rule_based import FACTORS, make_share_method
from fedvlm_jax.utils.option_ranges import NonNegative


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of ditto"""

    lambda_: Annotated[NonNegative, tyro.conf.arg(name="lambda")] = 0.1
    """Pull of the personal model towards the global one."""


def make(setup: Setup) -> Method:
    """Make ditto: fedavg-lora with a second model per client."""
    strength = setup.own(Options).lambda_
    source = "arXiv 2012.04221: w by FedAvg; v_k ← v_k − η(∇F_k(v_k) + λ(v_k − w)), v_k is what the client uses"
    federated = make_share_method("ditto", source, FACTORS, setup)

    def update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        state = personal["federated"]
        anchor = split_scales(federated.personalise(server=server, personal=state))[0]  # w as it was received
        state, message, metrics = federated.client_update(ctx, server=server, personal=state, client=client, key=key)
        own, optimizer, mine = ctx.train(
            personal["own"], personal["optimizer"], client, nudge=make_proximal(strength, anchor)
        )
        metrics |= {"loss": mine["loss"], "last_loss": mine["last_loss"], "global_loss": metrics["loss"]}
        return {"federated": state, "own": own, "optimizer": optimizer}, message, metrics

    return with_personal_model(federated, setup, update)
