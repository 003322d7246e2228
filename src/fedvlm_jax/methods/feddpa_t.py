"""FedDPA-T (arXiv 2403.19211): in every round a client trains its local adapter, then the global one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedvlm_jax.methods.parts.dual import make_dual_method
from fedvlm_jax.methods.record import Client, Method, Setup

__all__ = ["make"]

SOURCE = "arXiv 2403.19211: (A_g, B_g) averaged and (A_l, B_l) private, trained in turn; y = W_0 x + (1−α) g + α l"


def make(setup: Setup) -> Method:
    """feddpa-t: the local steps of a round are halved, so that it takes as many as any other method."""
    return make_dual_method("feddpa-t", SOURCE, setup, stages=lambda phase, client: halve(client))


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
