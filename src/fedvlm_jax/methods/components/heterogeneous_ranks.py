"""Ranks that differ between clients: everybody's adapter has the largest rank, and what is beyond a client's is zero.

A pair of a column of A and a row of B that are both zero has no gradient, so it stays zero. The scale is the largest
rank's for all, so that the same factors mean the same update everywhere.

Each direction, that is such a pair, is averaged over those who have it, with their weights made to sum to 1, and stays
as it is where no client in the round has it. To count as zero what a client lacks (zero padding, arXiv 2401.06432)
shrinks the higher directions, and a round of low ranks alone ends them for good.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Aggregated, Client, Context, Held, Key, Method, Metrics, Number, Updated, Weights
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.utils import tree


def with_ranks(method: Method, ranks: Sequence[int], *, send_rank: bool = True) -> Method:
    """Give every client its rank in a method: all that it starts from, receives and trains is zero beyond it.

    Args:
        method: any whose adapters' factors are leaves named a and b.
        ranks: of every client; empty: all have the adapter's, and the method stays as it is.
        send_rank: whether the client's rank is in its message, for an `aggregate` that reads `Context.held`.
    """
    if not ranks:
        return method
    ranks_of_all, widest = np.asarray(ranks, np.int32), max(ranks)

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        rank = jnp.asarray(ranks_of_all)[number]
        return {**cut(method.init_client(key=key, server=server, number=number), rank), "rank": rank}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        rank = personal["rank"]

        def train(factors: PyTree, optimizer: PyTree, client: Client, **choices: Any) -> tuple[PyTree, PyTree, Metrics]:
            # What a method draws during a round has the largest rank.
            return ctx.train(cut(factors, rank), optimizer, client, **choices)

        state, message, metrics = method.client_update(
            ctx._replace(train=train), server=cut(server, rank), personal=personal, client=client, key=key
        )
        return {**state, "rank": rank}, {"update": message, "rank": rank} if send_rank else message, metrics

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        if send_rank:
            held = (jnp.arange(widest) < messages["rank"][:, None]).astype(jnp.float32)
            ctx, messages = ctx._replace(held=held), messages["update"]
        return method.aggregate(ctx, server=server, messages=messages, weights=weights)

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        return method.personalise(server=cut(server, personal["rank"]), personal=personal)

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        message = message["update"] if send_rank else message
        return method.trained(server=cut(server, personal["rank"]), personal=personal, message=message)

    return replace(
        method, init_client=init_client, client_update=client_update, aggregate=aggregate, personalise=personalise,
        trained=trained, linear=False, split=None,
    )  # fmt: skip


def cut(state: PyTree, rank: Number) -> PyTree:
    """Zero what is beyond the rank in a tree of any state: columns of A, rows of B.

    >>> cut({"a": jnp.ones((1, 3)), "scale": jnp.ones(2)}, jnp.int32(2))["a"].tolist()
    [[1.0, 1.0, 0.0]]
    """

    def cut_leaf(keys: tuple[Any, ...], leaf: Array) -> Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axis = {"a": -1, "b": -2}.get(leaf_name(path)) if leaf.ndim > 1 else None
        return leaf if axis is None else scale(path, leaf, (jnp.arange(leaf.shape[axis]) < rank).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(cut_leaf, state)


def mean(updates: PyTree, weights: Weights, held: Held) -> PyTree:
    """Average every direction over those who have it: Σ p_k Δ_k, Σ p_k = 1 among them; 0 where nobody has it.

    >>> held = jnp.asarray([[1.0, 1.0], [1.0, 0.0]])
    >>> mean({"a": jnp.asarray([[[4.0, 8.0]], [[2.0, 0.0]]])}, jnp.asarray([0.5, 0.5]), held)["a"].tolist()
    [[3.0, 8.0]]
    """
    sums = tree.weighted_sum({"updates": updates, "held": held}, weights)
    share = jnp.where(sums["held"] > 0, 1 / jnp.maximum(sums["held"], 1e-12), 0)
    flat = tree.flatten(sums["updates"])
    return tree.unflatten({path: scale(path, leaf, share) for path, leaf in flat.items()})


def keep_unsent(new: PyTree, old: PyTree, weights: Weights, held: Held) -> PyTree:
    """Take the new values of the directions that somebody who counts has, and the old ones of the others."""
    sent = jnp.any((held > 0) & (weights > 0)[:, None], axis=0)
    before = tree.flatten(old)
    return tree.unflatten(
        {
            path: scale(path, leaf, sent.astype(leaf.dtype)) + scale(path, before[path], 1.0 - sent, otherwise=0)
            for path, leaf in tree.flatten(new).items()
        }
    )


def scale(path: str, leaf: Array, by: Float[Array, " R"], otherwise: float = 1) -> Array:
    """Multiply each direction of a leaf by a number, and by `otherwise` a leaf that has none."""
    name = leaf_name(path)
    if name == "a":
        return leaf * by
    return leaf * (by[:, None] if name == "b" else otherwise)
