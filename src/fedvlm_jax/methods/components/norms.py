"""Names of factors, norms of trees, and the drift of private factors."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.utils import tree


def norm_of(part: PyTree) -> Float[Array, ""]:
    """Compute the Frobenius norm over all leaves; 0 where there are none.

    >>> float(norm_of({"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}))
    5.0
    """
    leaves = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(part)]
    return jnp.sqrt(sum(leaves, start=jnp.float32(0)))


def only_a(part: PyTree) -> PyTree:
    """Select the factors A."""
    return tree.partition(part, lambda path: re.search(r"(^|/)a(/|$)", path) is not None)[0]


def personal_drift(own: PyTree, start: PyTree) -> Float[Array, ""]:
    """Compute ‖A_k − A_0‖ / ‖A_0‖ over the private factors A; 0 where none is private.

    A method whose private part hardly moves is another method under its name.

    Args:
        own: the private part.
        start: what this client began with, in its own rank; A at least.
    """
    first = only_a(start)
    return norm_of(jax.tree.map(jnp.subtract, only_a(own), first)) / jnp.maximum(norm_of(first), 1e-12)


def leaf_name(path: str) -> str:
    """Name the factor that a leaf is, also where a rule split off a layer.

    >>> leaf_name("fc1/b"), leaf_name("fc1/b/3")
    ('b', 'b')
    """
    return next(part for part in reversed(path.split("/")) if not part.replace(".", "").isdigit())


def only(*names: str) -> Callable[[str], bool]:
    """Make (path) -> whether the leaf is one of these factors."""
    return lambda path: leaf_name(path) in names
