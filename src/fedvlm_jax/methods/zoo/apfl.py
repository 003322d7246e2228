"""APFL (arXiv 2003.13461): each client uses a mixture of the federated model and one of its own, α v_k + (1 − α) w.

v_k is trained through the mixture, step by step beside w: what it is mixed with is the w of that step. Mixed are the
factors. α is fixed, or learned with v_k and kept between 0 and 1.

The authors' code differs from the paper, which is followed here: it mixes the outputs of two models instead of their
weights, trains v_k beside the w of after the step, and renews α once a round, with a pull of 0.02 α towards zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, Context, Message, Method, Metrics, Personal, Server, Setup, is_factor
from fedvlm_jax.methods.components import mixing
from fedvlm_jax.methods.components.training_metrics import over_steps
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method
from fedvlm_jax.utils import tree

__all__ = ["make"]

SOURCE = (
    "arXiv 2003.13461: w by FedAvg; v_k ← v_k − η ∇_v F_k(α v_k + (1−α) w), the mixture is what the client uses; "
    "the authors' code mixes outputs, not weights, and renews α once a round"
)


def make(setup: Setup) -> Method:
    """apfl: fedavg-lora with a second model per client, mixed with the first."""
    parts = Parts(reads=("hyper.apfl_alpha", "hyper.apfl_adaptive"))
    federated = make_share_method("apfl", SOURCE, FACTORS, setup, parts)
    hyper = setup.hyper
    trained_leaves = (lambda path: is_factor(path) or path == "alpha") if hyper.apfl_adaptive else is_factor

    def init_client(key: PRNGKeyArray, server: Server, number: Int[Array, ""]) -> Personal:
        state = federated.init_client(key, server, number)
        own = {**mixing.split(federated.personalise(server, state))[0], "alpha": jnp.float32(hyper.apfl_alpha)}
        return {"federated": state, "own": own, **setup.kept(setup.start_optimizer(own, trained_leaves))}

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        own = personal["own"]
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(own, trained_leaves)
        ended: list[tuple[PyTree, PyTree, Metrics]] = []

        def train(w: PyTree, w_state: PyTree, client: Client, **choices: Any) -> tuple[PyTree, PyTree, Metrics]:
            """The federated model's training, with the private one's beside it in every step."""

            def step(
                carry: PyTree, at: tuple[Int[Array, " batch"], Bool[Array, " batch"], Int[Array, ""]]
            ) -> tuple[PyTree, PyTree]:
                (w, w_state), (v, v_state) = carry
                one = client._replace(indices=at[0][None], mask=at[1][None])
                *after, metrics = ctx.train(w, w_state, one, first=at[2], **choices)
                *mine, own_metrics = ctx.train(
                    v, v_state, one, first=at[2], trained=trained_leaves, assemble=lambda factors: mixture(factors, w)
                )
                return (tuple(after), tuple(mine)), (metrics, own_metrics)

            start = ((w, w_state), (own, optimizer))
            ((w, w_state), (v, v_state)), history = jax.lax.scan(
                step, start, (client.indices, client.mask, jnp.arange(len(client.indices)))
            )
            metrics, own_metrics = (over_steps(part) for part in history)
            ended.append((v, v_state, own_metrics))
            return w, w_state, metrics

        beside = ctx._replace(train=train)
        state, message, metrics = federated.client_update(beside, server, personal["federated"], client, key)
        own, optimizer, mine = ended[0]
        own = {**own, "alpha": jnp.clip(own["alpha"], 0, 1)}
        metrics |= {"loss": mine["loss"], "last_loss": mine["last_loss"], "alpha": own["alpha"]}
        return {"federated": state, "own": own, **setup.kept(optimizer)}, message, metrics

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        return mixture(personal["own"], federated.personalise(server, personal["federated"]))

    def trained(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        return mixture(personal["own"], federated.trained(server, personal["federated"], message))

    return federated._replace(
        init_client=init_client, client_update=client_update, personalise=personalise, trained=trained
    )


def mixture(own: PyTree, adapter: lora.Adapter) -> lora.Adapter:
    """α v + (1 − α) w, factor by factor."""
    alpha, mine = own["alpha"], {name: part for name, part in own.items() if name != "alpha"}
    factors, scales = mixing.split(adapter)
    return tree.combine(jax.tree.map(lambda v, w: alpha * v + (1 - alpha) * w, mine, factors), scales)
