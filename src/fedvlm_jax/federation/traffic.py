"""What travels between a client and the server in a round, counted from shapes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax import tree
from fedvlm_jax.methods import Context, Method
from fedvlm_jax.methods.parts.norms import leaf_name

__all__ = ["count_bytes", "find_travelling"]


def find_travelling(method: Method, params: PyTree, server: PyTree, messages: PyTree) -> tuple[PyTree, PyTree]:
    """What one client sends and what it receives, as trees of shapes.

    Args:
        method: whose round.
        params, server: the base and the server's state, or their shapes.
        messages: of the cohort [K, …], or their shapes.
    """
    shapes = jax.eval_shape(lambda part: part, messages)
    if method.travels is not None:
        return method.travels(server, shapes)
    down = jax.eval_shape(method.download, server)
    if method.deliver is None or not jax.tree.leaves(shapes):
        return _first(shapes), down
    cohort = jax.tree.leaves(shapes)[0].shape[0]
    part = jax.eval_shape(
        lambda params, server, messages, weights: method.deliver(  # type: ignore[misc]
            Context(params, jnp.int32(1), 0, {"a": weights[0], "b": weights[0]}, _train_nothing),
            server,
            messages,
            weights,
        ),
        params,
        server,
        shapes,
        jax.ShapeDtypeStruct((cohort,), jnp.float32),
    )
    return _first(shapes), {"all": down, "own": _first(part)}


def count_bytes(part: PyTree, share: float = 1.0) -> int:
    """The bytes of a client whose rank is this share of the largest: padding beyond it does not travel."""
    return round(
        sum(
            tree.count_bytes(leaf) * (share if leaf_name(path) in ("a", "b") else 1)
            for path, leaf in tree.flatten(part).items()
        )
    )


def _first(stacked: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)


def _train_nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("what the server hands out is not trained there")
