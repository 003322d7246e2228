"""FedDPA (arXiv 2403.19211): a global adapter that is federated beside a local one that stays.

    y = x W_0 + (1 − α) s x A_g B_g + α s x A_l B_l

The local adapter is trained with the global one, as it was received, frozen beside it; then the global one, alone: the
order of the authors' code. Until a client has trained its local adapter it uses the global one as it is (α = 0). The
weight α is fixed here; the paper also adapts it to each question by similarity.

FedDPA-T trains both in every round. The local steps of a round are halved, so that it takes as many as any other
method, and both adapters are trained from round 1 on. In the authors' code the first round is the global adapter's
alone, and from the second one on each adapter takes all local steps: `--method.whole`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import Aggregated, Client, Context, Key, Method, Number, Setup, Updated, Weights
from fedvlm_jax.methods.components.factors import mix, norm_of, split_scales
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Share


@dataclass(frozen=True)
class Options(base.MethodOptions):
    """Numbers of feddpa-t"""

    alpha: Share = 0.5
    """Weight of the local adapter; the global one has the rest."""
    whole: bool = False
    """The schedule of the authors' code: the local adapter starts in round 2, and both adapters take all local steps,
    twice the work; else each takes half of them from round 1 on."""


def make(setup: Setup) -> Method:
    """Make feddpa-t: halves of a round's steps, or all of them for both adapters, as the options say."""
    options = setup.own(Options)
    source = (
        "arXiv 2403.19211: (A_g, B_g) averaged and (A_l, B_l) private, trained in turn; y = W_0 x + (1−α) g + α l; "
        "the authors' code gives both all local steps, l from round 2 on (--method.whole)"
    )
    if not options.whole:
        return make_dual_method("feddpa-t", source, setup, options.alpha, stages=lambda phase, client: halve(client))
    return make_dual_method(
        "feddpa-t", source, setup, options.alpha,
        stages=lambda phase, client: (client if phase else None, client), phase=lambda round_: int(round_ > 1),
    )  # fmt: skip


def halve(client: Client) -> tuple[Client | None, Client]:
    """Return the first half of the steps that count, and the rest; a client with fewer steps has halves of those."""
    steps = client.mask.shape[0]
    counts = client.mask.any(axis=1)
    middle = counts.sum() // 2
    order = jnp.argsort(~counts, stable=True)  # those that count come first

    def take(places: Int[Array, " some"]) -> Client:
        return client._replace(indices=client.indices[places], mask=client.mask[places])

    rest = take(jax.lax.dynamic_slice_in_dim(order, middle, steps - steps // 2))
    if steps < 2:
        return None, rest
    first = take(order[: steps // 2])
    return first._replace(mask=first.mask & (jnp.arange(steps // 2) < middle)[:, None]), rest


def make_dual_method(
    name: str,
    source: str,
    setup: Setup,
    alpha: float,
    *,
    stages: Callable[[int, Client], tuple[Client | None, Client | None]],
    phase: Callable[[int], int] = lambda round_: 0,
) -> Method:
    """Make a FedDPA in which the local adapter has the weight `alpha`.

    `stages` is (phase, client) -> the client with the steps that train the local adapter, and with those that train the
    global one; the rest as in `Method`.
    """

    def start_optimizers(own: PyTree) -> dict[str, PyTree]:
        return dict.fromkeys(("global", "local"), setup.start_optimizer(own))

    def init(adapter: lora.Adapter) -> PyTree:
        factors, scales = split_scales(adapter)
        return {"shared": factors, "start": factors, "scales": scales}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        own = server["start"] if setup.common_start else split_scales(setup.draw(key))[0]
        return {"own": own, "begun": jnp.zeros((), bool), **setup.kept(start_optimizers(own))}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        shared, own, scales = server["shared"], personal["own"], server["scales"]
        optimizers = dict(personal["optimizer"]) if setup.keep_optimizer else start_optimizers(own)
        message, metrics, begun = {}, {}, personal["begun"]
        of_local, of_global = stages(ctx.phase, client)
        if of_local is not None:
            own, optimizers["local"], metrics = ctx.train(
                own, optimizers["local"], of_local, assemble=lambda factors: mix(shared, factors, scales, alpha)
            )
            begun = begun | of_local.mask.any()
        if of_global is not None:
            trained, optimizers["global"], more = ctx.train(
                shared, optimizers["global"], of_global, assemble=lambda factors: tree.combine(factors, scales)
            )
            message = jax.tree.map(jnp.subtract, trained, shared)
            local = metrics.get("steps", 0)  # the loss is the local pair's, unless it took no step
            metrics = {name: jnp.where(local > 0, metrics.get(name, x), x) for name, x in more.items()}
            metrics["steps"] = more["steps"] + local
        metrics |= {"update_norm": norm_of(message)}
        return {"own": own, "begun": begun, **setup.kept(optimizers)}, message, metrics

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        del ctx
        update = tree.weighted_sum(messages, weights)
        shared = jax.tree.map(jnp.add, server["shared"], update) if update else server["shared"]
        return {**server, "shared": shared}, {"shared_norm": norm_of(shared), "shared_update_norm": norm_of(update)}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        weight = jnp.where(personal["begun"], alpha, 0.0)
        return mix(server["shared"], personal["own"], server["scales"], weight)

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        shared = jax.tree.map(jnp.add, server["shared"], message) if message else server["shared"]
        return personalise({**server, "shared": shared}, personal)

    plain = "its global adapter is averaged plainly, as the paper has it"
    ranks = "the paper's two adapters have one rank for all, and so have these"
    return Method(
        name=name, source=source, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate,
        personalise=personalise, trained=trained, download=lambda server: server["shared"], phase=phase,
        broadcast=base.broadcast_parts("shared"), linear=True,
        travels=lambda server, messages: (base.shape_of_one(messages), base.shape_of_one(messages)), pairs=2,
        refuses={"server": plain, "local.proximal": plain, "local.scaffold": plain, "lora.ranks": ranks},
    )  # fmt: skip
