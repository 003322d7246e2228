"""FedDPA-T (arXiv 2403.19211): in every round a client trains its local adapter, then the global one.

The local steps of a round are halved, so that it takes as many as any other method, and both adapters are trained from
round 1 on. In the authors' code the first round is the global adapter's alone, and from the second one on each adapter
takes all local steps: `--method.whole`. Until a client has trained its local adapter, in its first round with that
schedule, it uses the global one as it is.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedvlm_jax.methods.base import Client, Method, Setup
from fedvlm_jax.methods.components.dual_adapter import make_dual_method
from fedvlm_jax.methods.config import MethodOptions
from fedvlm_jax.utils.option_ranges import Share

SOURCE = (
    "arXiv 2403.19211: (A_g, B_g) averaged and (A_l, B_l) private, trained in turn; y = W_0 x + (1−α) g + α l; "
    "the authors' code gives both all local steps, l from round 2 on (--method.whole)"
)


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of feddpa-t"""

    alpha: Share = 0.5
    """Weight of the local adapter; the global one has the rest."""
    whole: bool = False
    """The schedule of the authors' code: the local adapter starts in round 2, and both adapters take all local steps,
    twice the work; else each takes half of them from round 1 on."""


def make(setup: Setup) -> Method:
    """feddpa-t: halves of a round's steps, or all of them for both adapters, as the options say."""
    options = setup.own(Options)
    if not options.whole:
        return make_dual_method("feddpa-t", SOURCE, setup, options.alpha, stages=lambda phase, client: halve(client))
    return make_dual_method(
        "feddpa-t", SOURCE, setup, options.alpha,
        stages=lambda phase, client: (client if phase else None, client),
        phase=lambda round_: int(round_ > 1),
    )  # fmt: skip


def halve(client: Client) -> tuple[Client | None, Client]:
    """The first half of the steps that count, and the rest; whoever takes fewer steps has halves of what it takes."""
    steps = client.mask.shape[0]
    counts = client.mask.any(axis=1)
    middle = counts.sum() // 2
    order = jnp.argsort(~counts, stable=True)  # those that count come first
    rest = take(client, jax.lax.dynamic_slice_in_dim(order, middle, steps - steps // 2))
    if steps < 2:
        return None, rest
    first = take(client, order[: steps // 2])
    return first._replace(mask=first.mask & (jnp.arange(steps // 2) < middle)[:, None]), rest


def take(client: Client, steps: Int[Array, " some"]) -> Client:
    """The client with these steps."""
    return client._replace(indices=client.indices[steps], mask=client.mask[steps])
