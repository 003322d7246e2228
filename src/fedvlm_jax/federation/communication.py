"""Communication: what travels between a client and the server in a round, counted from shapes."""

import jax
from jaxtyping import PyTree

from fedvlm_jax.methods import Method
from fedvlm_jax.methods.base import shape_of_one
from fedvlm_jax.methods.components.norms import leaf_name
from fedvlm_jax.utils import tree


def find_travelling(method: Method, server: PyTree, messages: PyTree) -> tuple[PyTree, PyTree]:
    """Return what one client sends and what it receives, as trees of shapes.

    Args:
        method: whose round.
        server: the server's state, or its shapes.
        messages: of the cohort [K, …], or their shapes.
    """
    shapes = jax.eval_shape(lambda part: part, messages)
    if method.travels is not None:
        return method.travels(server=server, messages=shapes)
    return shape_of_one(shapes), jax.eval_shape(lambda server: method.download(server=server), server)


def count_bytes(part: PyTree, share: float = 1.0) -> int:
    """Count the bytes of a client whose rank is this share of the largest: padding beyond it does not travel."""
    return round(
        sum(
            tree.count_bytes(leaf) * (share if leaf_name(path) in ("a", "b") else 1)
            for path, leaf in tree.flatten(part).items()
        )
    )
