"""pFedMe (arXiv 2006.08848): personal models as minimisers of Moreau envelopes around the federated one.

A client holds a local copy w_k of the global model. In each of its local rounds it takes a few steps towards
θ_k = argmin F_k(θ) + λ/2 ‖θ − w_k‖², then w_k ← w_k − η λ (w_k − θ_k). The server goes w ← (1 − β) w + β Σ p_k w_k, and
θ_k is what the client uses. Its inner steps read one batch each, where the paper keeps one batch for all of them.

The paper does not say where a round's θ_k begins; here it goes on from the last one. The authors' code loads the global
model into θ_k at the beginning of every round: `--method.restart`.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import PyTree

from fedvlm_jax.methods.base import Client, Context, Key, Method, MethodOptions, Setup, Updated, Weights
from fedvlm_jax.methods.components.client_regularizers import make_proximal
from fedvlm_jax.methods.components.factors import split_scales
from fedvlm_jax.methods.components.personal_model import with_personal_model
from fedvlm_jax.methods.components.training_metrics import over_steps
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Count, Positive


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of pfedme"""

    lambda_: Annotated[Positive, tyro.conf.arg(name="lambda")] = 1.0
    """Strength of the Moreau envelope; at 0 the global model would never move."""
    inner: Count = 4
    """Steps that approximate its minimum; local steps are cut into groups of so many."""
    rate: Positive = 0.1
    """Learning rate of the local copy of the global model."""
    beta: Positive = 1.0
    """Share of the average in the new global model."""
    restart: bool = False
    """Begin every round with the personal model at the global one, as the authors' code does; the paper leaves the
    start open, and here it goes on from where it was."""


def make(setup: Setup) -> Method:
    """Make pfedme: fedavg-lora's server, with other local rounds."""
    options = setup.own(Options)
    source = (
        "arXiv 2006.08848: θ_k ≈ argmin F_k(θ) + λ/2 ‖θ − w_k‖², w_k ← w_k − ηλ(w_k − θ_k); w ← (1−β) w + β Σ p_k w_k; "
        "the authors' code begins every round with θ_k at w (--method.restart)"
    )
    local_rounds = "its local rounds are its own: the pull towards the global model is part of them"
    padded = "a step of w_k towards θ_k is not written for factors that are padded"

    def average(shared: object, messages: PyTree, weights: Weights, held: object) -> PyTree:
        del shared, held
        return jax.tree.map(lambda leaf: options.beta * leaf, tree.weighted_sum(messages, weights))

    refuses = {"local.proximal": local_rounds, "local.scaffold": local_rounds, "lora.ranks": padded}
    parts = Parts(average=average, linear=True, refuses=refuses)
    # The optimiser is the personal model's: the federated one takes steps of its own.
    federated = make_share_method("pfedme", source, FACTORS, replace(setup, keep_optimizer=False), parts)

    def update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        received, scales = split_scales(federated.personalise(server=server, personal=personal["federated"]))
        local, history = received, []
        own = tree.combine(received, scales) if options.restart else personal["own"]
        optimizer = personal["optimizer"]
        steps = client.mask.shape[0]
        for first in range(0, steps, options.inner):  # not scanned: the last group may be shorter
            part = slice(first, min(first + options.inner, steps))
            some = client._replace(indices=client.indices[part], mask=client.mask[part])
            start = tree.combine(split_scales(own)[0], scales)
            own, optimizer, metrics = ctx.train(start, optimizer, some, nudge=make_proximal(options.lambda_, local))
            pull = jnp.where(some.mask.any(), options.rate * options.lambda_, 0.0)
            local = jax.tree.map(lambda w, theta, pull=pull: w - pull * (w - theta), local, split_scales(own)[0])
            history.append(metrics)
        metrics = over_steps({name: jnp.stack([one[name] for one in history]) for name in history[0]})
        message = jax.tree.map(jnp.subtract, local, received)
        own = jax.tree.map(lambda new, old: jnp.where(client.mask.any(), new, old), own, personal["own"])
        return {**personal, "own": own, "optimizer": optimizer}, message, metrics

    return with_personal_model(federated, setup, update)
