"""APFL (arXiv 2003.13461): each client uses a mixture of the federated model and one of its own, α v_k + (1 − α) w.

v_k is trained through the mixture, step by step beside w: what it is mixed with is the w of that step. Mixed are the
factors. α is fixed, or learned with v_k and kept between 0 and 1.

The authors' code differs from the paper, which is followed here: it mixes the outputs of two models instead of their
weights, trains v_k beside the w of after the step, and renews α once a round, with a pull of 0.02 α towards zero.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, Context, Key, Method, MethodOptions, Metrics, Setup, Updated, is_factor
from fedvlm_jax.methods.components.factors import split_scales
from fedvlm_jax.methods.components.personal_model import with_personal_model
from fedvlm_jax.methods.components.training_metrics import over_steps
from fedvlm_jax.methods.rule_based import FACTORS, make_share_method
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Share


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of apfl"""

    alpha: Share = 0.5
    """Share of the private model in the mixture, at the start."""
    adaptive: bool = False
    """Learn that share with the private model, at the rate of B."""


def make(setup: Setup) -> Method:
    """Make apfl: fedavg-lora with a second model per client, mixed with the first."""
    options = setup.own(Options)
    source = (
        "arXiv 2003.13461: w by FedAvg; v_k ← v_k − η ∇_v F_k(α v_k + (1−α) w), the mixture is what the client uses; "
        "the authors' code mixes outputs, not weights, and renews α once a round"
    )
    federated = make_share_method("apfl", source, FACTORS, setup)

    def trained(path: str) -> bool:
        return is_factor(path) or (options.adaptive and path == "alpha")

    def start(adapter: lora.Adapter) -> PyTree:
        return {**split_scales(adapter)[0], "alpha": jnp.float32(options.alpha)}

    def update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        ended: list[tuple[PyTree, PyTree, Metrics]] = []

        def train(w: PyTree, w_state: PyTree, client: Client, **choices: Any) -> tuple[PyTree, PyTree, Metrics]:
            """Train the federated model, and in every step the private one beside it."""

            def step(carry: PyTree, at: tuple[Array, Array, Array]) -> tuple[PyTree, PyTree]:
                (w, w_state), (v, v_state) = carry
                one = client._replace(indices=at[0][None], mask=at[1][None])
                *after, metrics = ctx.train(w, w_state, one, first=at[2], **choices)
                *mine, own_metrics = ctx.train(
                    v, v_state, one, first=at[2], trained=trained, assemble=lambda factors: mixture(factors, w)
                )
                return (tuple(after), tuple(mine)), (metrics, own_metrics)

            ((w, w_state), (v, v_state)), history = jax.lax.scan(
                step,
                ((w, w_state), (personal["own"], personal["optimizer"])),
                (client.indices, client.mask, jnp.arange(len(client.indices))),
            )
            metrics, own_metrics = (over_steps(part) for part in history)
            # Past the federated method, which knows of one model only.
            ended.append((v, v_state, own_metrics))
            return w, w_state, metrics

        state, message, metrics = federated.client_update(
            ctx._replace(train=train), server=server, personal=personal["federated"], client=client, key=key
        )
        v, v_state, mine = ended[0]
        v = {**v, "alpha": jnp.clip(v["alpha"], 0, 1)}
        metrics |= {"loss": mine["loss"], "last_loss": mine["last_loss"], "alpha": v["alpha"]}
        return {"federated": state, "own": v, "optimizer": v_state}, message, metrics

    return with_personal_model(federated, setup, update, start=start, trained=trained, use=mixture)


def mixture(own: PyTree, adapter: lora.Adapter) -> lora.Adapter:
    """Return α v + (1 − α) w, factor by factor.

    >>> mixture({"alpha": 0.25, "b": 4.0}, {"b": 8.0, "scale": 1.0})
    {'b': 7.0, 'scale': 1.0}
    """
    alpha, mine = own["alpha"], {name: part for name, part in own.items() if name != "alpha"}
    factors, scales = split_scales(adapter)
    return tree.combine(jax.tree.map(lambda v, w: alpha * v + (1 - alpha) * w, mine, factors), scales)
