"""Nested dictionaries of arrays, addressed by slash-separated paths.

Parameters, adapters, messages and optimiser states are all such trees. A tree that was cut in two by `partition` is
put together again by `combine`; a side that got nothing is `{}`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a nested dictionary into one level; paths come in sorted order.

    >>> flatten({"fc1": {"b": 2, "a": 1}})
    {'fc1/a': 1, 'fc1/b': 2}
    """
    return dict(sorted(traverse_util.flatten_dict(dict(tree), sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`.

    >>> unflatten({"fc1/a": 1})
    {'fc1': {'a': 1}}
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def partition(tree: Mapping[str, Any], belongs: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree by the paths of its leaves: those that `belongs` accepts, and the rest. Neither side keeps holes.

    >>> partition({"fc1": {"a": 1, "b": 2}}, lambda path: path.endswith("/a"))
    ({'fc1': {'a': 1}}, {'fc1': {'b': 2}})
    """
    flat = flatten(tree)
    inside = {path: leaf for path, leaf in flat.items() if belongs(path)}
    outside = {path: leaf for path, leaf in flat.items() if path not in inside}
    return unflatten(inside), unflatten(outside)


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Join trees of disjoint leaves.

    Raises:
        ValueError: two trees hold the same path.

    >>> combine({"fc1": {"a": 1}}, {"fc1": {"b": 2}})
    {'fc1': {'a': 1, 'b': 2}}
    """
    joined: dict[str, Any] = {}
    for tree in trees:
        flat = flatten(tree)
        twice = sorted(joined.keys() & flat.keys())
        if twice:
            raise ValueError(f"these leaves are in more than one of the trees to combine: {', '.join(twice[:5])}")
        joined |= flat
    return unflatten(joined)


def weighted_sum(stacked: PyTree, weights: Float[Array, " clients"]) -> PyTree:
    """`Σ_k weights_k · stacked_k` over the leading axis [K, …] of every leaf, in float32.

    The leaves are laid side by side first, so that a client axis that is sharded costs one all-reduce in all, not one
    per leaf. Leaves keep their dtypes.

    >>> weighted_sum({"a": jnp.asarray([[0.0, 2.0], [4.0, 6.0]])}, jnp.asarray([0.75, 0.25]))["a"].tolist()
    [1.0, 3.0]
    """
    if not jax.tree.leaves(stacked):
        return stacked
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], stacked))
    rows = jnp.concatenate(
        [leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in jax.tree.leaves(stacked)], axis=1
    )
    weights = weights.astype(jnp.float32)
    rows = jnp.where(weights[:, None] == 0, 0, rows)  # a client that does not count may well have overflowed
    summed = jnp.einsum("k,kn->n", weights, rows, precision="highest")
    return unravel(summed)


def choose(first: Bool[Array, ""], one: PyTree, other: PyTree) -> PyTree:
    """Select one tree or the other; what is not chosen leaves no trace, as a product with zero would.

    >>> choose(jnp.asarray(False), {"b": 1.0}, {"b": 2.0})["b"].tolist()
    2.0
    """
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)


def count_bytes(tree: PyTree) -> int:
    """Count the bytes of all leaves; works on shapes as on arrays.

    >>> count_bytes({"a": jax.ShapeDtypeStruct((4, 2), jnp.bfloat16)})
    16
    """
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Tell whether every number is finite, and the sum of their squares too: beyond that a model's output is not.

    Integers and booleans are finite. A tree without leaves is.
    """
    sums = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.isfinite(sum(sums, start=jnp.float32(0)))
