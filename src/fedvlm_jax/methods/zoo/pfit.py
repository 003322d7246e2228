"""PFIT (arXiv 2404.13238v1): personal models that reinforcement learning fits to a client's own mix of two rewards.

    θ_k ← argmax E[w_k r_1 + (1 − w_k) r_2] − β KL(π_θ ‖ π_0) − λ/2 ‖θ − θ_g‖²,   θ_g ← Σ p_k θ_k

The reward is the objective's (`--objective reward`, see `objectives.reward`, with `--preference.*`), and this is what
is shared: every client keeps its adapter θ_k from round to round, pulls it towards the global one, which is the mean of
all, and sends how far it is from there. So a client that takes no part goes on from its own model, and one that is new
begins at the global one. Only the last layers are trained (`--method.layers` names others), and only they travel.

Published are the rewards mixed linearly per client, the penalty on the deviation of the local from the global
parameters, that the last layers alone are trained and aggregated, and PPO. No code of its authors was found. Ours: that
the penalty is a term of the loss with a gradient (λ is not given by the paper), that the last layers of the text
decoder have LoRA instead of being trained whole, that a client's model is never overwritten by the average, and the
kind of policy gradient; the paper's sparse attention is not here. Any objective can be trained; with `sft` this is the
same sharing without the reward.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.lora.sites import listing, search
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import (
    Aggregated,
    Client,
    Context,
    Key,
    Method,
    MethodOptions,
    Number,
    Setup,
    Updated,
    Weights,
)
from fedvlm_jax.methods.components.client_regularizers import make_proximal
from fedvlm_jax.methods.components.factors import leaf_name, norm_of
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import NonNegative


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of pfit"""

    pull: NonNegative = 0.1
    """Pull of a client's adapter towards the global one, lambda (not given by the paper)."""
    layers: Annotated[str, tyro.conf.arg(metavar="REGEX")] = ""
    """Adapters that are trained and shared: those in whose path, a layer's number included, this is found. For example
    'decoder/layers/5/'. By default the last third of the text decoder's (how many are last, the paper does not say)."""

    def __post_init__(self) -> None:
        search(self.layers, "")  # refuses what is no regular expression


def make(setup: Setup) -> Method:
    """Make pfit: personal adapters of the last layers around their mean."""
    options = setup.own(Options)
    source = (
        "arXiv 2404.13238v1: θ_k maximises its mix of two rewards − β KL − λ/2 ‖θ_k − θ_g‖² in the last layers, "
        "θ_g = Σ p_k θ_k; the rewards are those of --objective reward"
    )

    def split(adapter: lora.Adapter) -> tuple[PyTree, PyTree]:
        chosen = find_named(adapter, setup, options.layers) if options.layers else find_last(adapter, setup)
        return lora.partition(adapter, lambda path: leaf_name(path) in ("a", "b") and chosen(path), setup.sites)

    def init(adapter: lora.Adapter) -> PyTree:
        shared, rest = split(adapter)
        return {"shared": shared, "rest": rest}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        own = server["shared"] if setup.common_start else split(setup.draw(key))[0]
        return {"own": own, **setup.kept(setup.start_optimizer(own, _all))}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        own, shared = personal["own"], server["shared"]
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(own, _all)
        own, optimizer, metrics = ctx.train(
            own, optimizer, client, trained=_all, assemble=lambda moving: lora.combine(moving, server["rest"]),
            nudge=make_proximal(options.pull, shared),
        )  # fmt: skip
        message = jax.tree.map(jnp.subtract, own, shared)
        return {"own": own, **setup.kept(optimizer)}, message, metrics | {"update_norm": norm_of(message)}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        del ctx
        update = tree.weighted_sum(messages, weights)
        shared = jax.tree.map(jnp.add, server["shared"], update)
        return {**server, "shared": shared}, {"shared_norm": norm_of(shared), "shared_update_norm": norm_of(update)}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        return lora.combine(personal["own"], server["rest"])

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        return lora.combine(jax.tree.map(jnp.add, server["shared"], message), server["rest"])

    plain = "the mean of the clients' models is what they are pulled towards, as the paper has it"
    return Method(
        name="pfit", source=source, init=init, init_client=init_client, client_update=client_update,
        aggregate=aggregate, personalise=personalise, trained=trained, download=lambda server: server["shared"],
        broadcast=base.broadcast_parts("shared"), linear=True,
        travels=lambda server, messages: (base.shape_of_one(messages), base.shape_of_one(messages)),
        refuses={
            "server": plain,
            "local.proximal": "it has a pull of its own, --method.pull",
            "local.scaffold": "a client goes on from its own model, and not from the one that it received",
            "lora.ranks": "clients are pulled towards a mean, which must have their form",
            "top-k": "a message is how far a client is from the mean, and what was left out of it would be sent again",
        },
        objective="reward",
    )  # fmt: skip


def find_last(adapter: lora.Adapter, setup: Setup) -> Callable[[str], bool]:
    """Find which virtual paths of an adapter lie in the last third of the text decoder's layers, or there in none.

    Of a model without a decoder, one that chooses among classes, the text encoder's are meant; of one whose parts are
    not known, all layers that have a number.

    Raises:
        UserError: no adapter sits there.
    """
    part = next((setup.components[name] for name in ("decoder", "encoder") if name in setup.components), "")
    inside = [path for path in list_paths(adapter, setup) if re.match(part, path)]
    if not inside:
        raise UserError(
            "pfit trains the last layers of the text decoder, where --lora.targets names no weight: say with "
            "--method.layers which layers are meant"
        )
    layers = sorted({number_layer(path) for path in inside} - {()})
    chosen = {(), *layers[len(layers) - math.ceil(len(layers) / 3) :]}
    return lambda path: re.match(part, path) is not None and number_layer(path) in chosen


def find_named(adapter: lora.Adapter, setup: Setup, layers: str) -> Callable[[str], bool]:
    """Find which virtual paths of an adapter hold what `--method.layers` says.

    Raises:
        UserError: none does.
    """
    paths = list_paths(adapter, setup)
    if not any(search(layers, path) for path in paths):
        raise UserError(f"--method.layers {layers!r} is found in no adapter's path; there are:\n{listing(paths)}")
    return partial(search, layers)


def list_paths(adapter: lora.Adapter, setup: Setup) -> list[str]:
    """List the virtual paths of an adapter's leaves."""
    return [path for leaf in tree.flatten(adapter) for path in lora.virtual_paths(adapter, leaf, setup.sites)]


def number_layer(path: str) -> tuple[int, ...]:
    """Return the numbers in a virtual path, outermost first; none outside of numbered layers.

    >>> number_layer("decoder/layers/3/fc1/b"), number_layer("decoder/lm_head/b")
    ((3,), ())
    """
    return tuple(int(part) for part in path.split("/") if part.isdigit())


def _all(path: str) -> bool:
    del path
    return True
