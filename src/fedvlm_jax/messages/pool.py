"""The record of a pool: it makes one message of a round's, and the method's own `aggregate` takes that.

A method for which the weighted mean is enough (`Method.linear`) does with a single message of weight 1 what it does
with all of them, so whatever stands in place of the mean goes before it: a rule that withstands hostile clients, noise,
a sum of integers. The other methods need to see every message, and refuse a pool.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Aggregated, Context, Key, Method, Metrics, Weights
from fedvlm_jax.utils import tree


class Pooled(NamedTuple):
    """The results of pooling a round's messages.

    Attributes:
        message: one, of the form of a client's; not a number of it comes from who has weight 0.
        state: the pool's, of the same shapes as before.
        told: scalars, and `selection` [K] where the rule chooses: each client's part in the result, 0 for none.
        counted: whether anybody counted, where the rule knows that without a sum of the weights over the devices.
    """

    message: PyTree
    state: PyTree
    told: Metrics
    counted: Bool[Array, ""] | None = None


class PoolMessages(Protocol):
    """Make one message of `messages` [K, …]; who has weight 0 does not count, whatever it sent."""

    def __call__(self, ctx: Context, *, state: PyTree, messages: PyTree, weights: Weights) -> Pooled: ...


def no_state(shared: PyTree) -> PyTree:
    """Begin without a state."""
    del shared
    return {}


class Pool(NamedTuple):
    """A rule that makes one message of a round's.

    Attributes:
        name: as `--messages.pool` has it, or what else it is.
        run: see `PoolMessages`.
        init: (what the server shares at first) -> the pool's state; a message has some or all of these leaves.
        always: whether it releases a message also in a round in which nobody counts, as noise must be.
    """

    name: str
    run: PoolMessages
    init: Callable[[PyTree], PyTree] = no_state
    always: bool = False


def with_pool(method: Method, pool: Pool) -> Method:
    """Put a pool before a method's `aggregate`; its state is part of the server's, as `pool`.

    Raises:
        ValueError: the method needs every message.
    """
    if not method.linear:
        raise ValueError(f"{method.name} needs every client's message: it takes no pool")

    def init(adapter: lora.Adapter) -> PyTree:
        server = method.init(adapter=adapter)
        return {**server, "pool": pool.init(method.download(server=server))}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        pooled = pool.run(ctx, state=server["pool"], messages=messages, weights=weights)
        counts = jnp.asarray(pool.always) | (weights.sum() > 0 if pooled.counted is None else pooled.counted)
        alone = ctx._replace(numbers=None, held=None)
        # Where nobody counts the server stays as it is, and so does the pool.
        new, health = method.aggregate(
            alone,
            server=server,
            messages=jax.tree.map(lambda leaf: leaf[None], pooled.message),
            weights=counts.astype(jnp.float32)[None],
        )
        state = jax.tree.map(lambda now, before: jnp.where(counts, now, before), pooled.state, server["pool"])
        return {**new, "pool": state}, health | pooled.told

    return replace(method, init=init, aggregate=aggregate)


def to_rows(messages: PyTree) -> Float[Array, "cohort entries"]:
    """Lay each client's message out as one row.

    >>> to_rows({"b": jnp.ones((3, 2, 4)), "c": jnp.ones((3, 5))}).shape
    (3, 13)
    """
    leaves = jax.tree.leaves(messages)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def from_row(row: Float[Array, " entries"], messages: PyTree) -> PyTree:
    """Make a message of a row, in the form of one of these messages [K, …].

    >>> from_row(jnp.arange(6.0), {"b": jnp.zeros((3, 2, 2)), "c": jnp.zeros((3, 2))})["c"].tolist()
    [4.0, 5.0]
    """
    leaves, structure = jax.tree.flatten(messages)
    ends = list(itertools.accumulate(leaf.size // leaf.shape[0] for leaf in leaves))
    parts = jnp.split(row, ends[:-1])
    formed = [part.reshape(leaf.shape[1:]).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, formed)


def count_entries(messages: PyTree) -> int:
    """Count the numbers of one client's message.

    >>> count_entries({"b": jnp.zeros((3, 2, 4))})
    8
    """
    return sum(leaf.size // leaf.shape[0] for leaf in tree.flatten(messages).values())


def round_at_random(exact: Float[Array, "..."], key: Key) -> Float[Array, "..."]:
    """Round each number to the integer above or below, at random so that the mean is the number.

    >>> round_at_random(jnp.asarray([2.0, -3.0]), jax.random.key(0)).tolist()
    [2.0, -3.0]
    """
    below = jnp.floor(exact)
    return below + (jax.random.uniform(key, exact.shape) < exact - below)
