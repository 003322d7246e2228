"""Communication: what travels between a client and the server in a round, counted from shapes."""

import jax
from jaxtyping import PyTree

from fedvlm_jax.methods import Method
from fedvlm_jax.methods.base import shape_of_one
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.utils import tree


def find_travelling(method: Method, server: PyTree, messages: PyTree) -> tuple[PyTree, PyTree]:
    """Return what a client sends and receives, as shapes, from a server's state and messages [K, …] or their shapes."""
    shapes = jax.eval_shape(lambda part: part, messages)
    if method.travels is not None:
        return method.travels(server=server, messages=shapes)
    return shape_of_one(shapes), jax.eval_shape(lambda server: method.download(server=server), server)


def count_bytes(part: PyTree, share: float = 1.0) -> int:
    """Count the bytes of a client whose rank is this share of the largest: padding beyond it does not travel.

    >>> count_bytes({"a": jax.ShapeDtypeStruct((8, 4), "float32"), "c": jax.ShapeDtypeStruct((4,), "float32")}, 0.5)
    80
    """
    shares = {"a": share, "b": share}  # of all other leaves a client of any rank has the whole
    leaves = tree.flatten(part).items()
    return round(sum(tree.count_bytes(leaf) * shares.get(leaf_name(path), 1) for path, leaf in leaves))
