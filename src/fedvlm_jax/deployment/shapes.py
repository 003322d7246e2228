"""The shapes of what travels, which both sides find out alike: of the method and the start, without a model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax.config.run_options import TrainOptions
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.round_shapes import shape_client, shape_key
from fedvlm_jax.methods import Context, Method


def shape_received(method: Method, start: PyTree) -> PyTree:
    """Make the shapes of what a client receives; `start` is the server's state at the start, or its shapes."""
    return jax.eval_shape(lambda server: method.broadcast(server=server, number=jnp.int32(0), last=None), start)


def shape_personal(method: Method, start: PyTree) -> PyTree:
    """Make the shapes of a client's personal state."""
    return jax.eval_shape(partial(start_personal, method), shape_key(), _shape_view(method, start), _NUMBER)


def shape_message(method: Method, params: PyTree, start: PyTree, train: TrainOptions, phase: int) -> PyTree:
    """Make the shapes of a client's message in rounds of a phase; `params` are the base's, or their shapes."""
    client = shape_client({}, 1, max(1, train.local_steps), train.batch_size)

    def update(params: PyTree, server: PyTree, personal: PyTree, client: Any, key: Array) -> PyTree:
        ctx = Context(params, jnp.int32(1), phase, {"a": jnp.float32(0), "b": jnp.float32(0)}, _stay, key)
        return method.client_update(ctx, server=server, personal=personal, client=client, key=key)[1]

    server, personal = _shape_view(method, start), shape_personal(method, start)
    return jax.eval_shape(update, params, server, personal, client, shape_key())


_NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def _shape_view(method: Method, start: PyTree) -> PyTree:
    received = shape_received(method, start)
    return jax.eval_shape(lambda start, received: method.view(start=start, received=received), start, received)


def _stay(factors: PyTree, optimizer: PyTree, client: Any, **choices: Any) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Train nothing: a message has the same shapes."""
    del client, choices
    return factors, optimizer, dict.fromkeys(("loss", "last_loss", "gradient_norm", "steps"), jnp.float32(0))
