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
from jaxtyping import Array, Int

from fedvlm_jax.methods.base import Client, Context, Method, MethodOptions, Setup
from fedvlm_jax.methods.components.dual_adapters import Pairs, PairsTrained, TrainPairs, make_dual_method
from fedvlm_jax.methods.components.factors import mix
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Share


@dataclass(frozen=True)
class Options(MethodOptions):
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
        halves = train_in_turn(options.alpha, lambda phase, client: halve(client))
        single = "with --train.local-steps 1 feddpa-t trains no local adapter: a round's only step is the global one's"
        unreached = single if setup.local_steps == 1 else ""
        return make_dual_method("feddpa-t", source, setup, options.alpha, train=halves, unreached=unreached)
    whole = train_in_turn(options.alpha, lambda phase, client: (client if phase else None, client))
    first = "in 1 round feddpa-t trains no local adapter: with --method.whole it is trained from round 2 on"
    return make_dual_method(
        "feddpa-t", source, setup, options.alpha, train=whole, phase=lambda round_: int(round_ > 1),
        unreached=first if setup.rounds < 2 else "",
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


Stages = Callable[[int, Client], tuple[Client | None, Client | None]]


def train_in_turn(alpha: float, stages: Stages) -> TrainPairs:
    """Make the training of the local adapter beside the global one as it was received, then of the global one, alone.

    `stages` is (phase, client) -> the client with the steps that train the local adapter, and with those that train the
    global one.
    """

    def train(ctx: Context, pairs: Pairs, client: Client) -> PairsTrained:
        shared, own, scales = pairs.received, pairs.own, pairs.scales
        optimizers, message, metrics, begun = pairs.optimizers, {}, {}, False
        of_local, of_global = stages(ctx.phase, client)
        if of_local is not None:
            own, optimizers["local"], metrics = ctx.train(
                own, optimizers["local"], of_local, assemble=lambda factors: mix(shared, factors, scales, alpha)
            )
            begun = of_local.mask.any()
        if of_global is not None:
            trained, optimizers["global"], more = ctx.train(
                shared, optimizers["global"], of_global, assemble=lambda factors: tree.combine(factors, scales)
            )
            message = jax.tree.map(jnp.subtract, trained, shared)
            local = metrics.get("steps", 0)  # the loss is the local pair's, unless it took no step
            metrics = {name: jnp.where(local > 0, metrics.get(name, x), x) for name, x in more.items()}
            metrics["steps"] = more["steps"] + local
        return PairsTrained(own, message, optimizers, begun, metrics)

    return train
