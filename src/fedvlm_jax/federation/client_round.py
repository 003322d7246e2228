"""A client's part of a round: the same function under the simulator's `vmap` and on a machine of its own."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from fedvlm_jax.federation.local_training import LocalTrainer
from fedvlm_jax.methods import Client, Context, Method
from fedvlm_jax.methods.base import Metrics, Number
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.random_streams import Stream


class Frame(NamedTuple):
    """The round as all its clients share it."""

    params: PyTree  # the frozen base, as the method has it in this round
    server: PyTree  # the state before the round, or a client's view of it
    rates: dict[str, Float[Array, ""]]  # learning rates of `a` and `b`
    round: Number
    key: PRNGKeyArray  # the run's
    tables: PyTree = None  # name -> array, what an objective that draws answers reads beside its batch


class ClientUpdated(NamedTuple):
    """The results of a client's round: zeros and the state that it came with where its numbers are not finite."""

    personal: PyTree
    message: PyTree
    metrics: Metrics
    finite: Bool[Array, ""]


def make_context(trainer: LocalTrainer, frame: Frame, phase: int, drops: PRNGKeyArray | None = None) -> Context:
    """Make the round as a method's functions see it; `drops` is the client's key for its dropout."""
    asked = itertools.count()  # each training that the method asks for has a key of its own

    def train(factors: PyTree, optimizer: PyTree, client: Client, **choices: Any) -> Any:
        drawn = {} if drops is None else {"key": jax.random.fold_in(drops, next(asked)), "tables": frame.tables}
        return trainer.run(frame.params, factors, optimizer, client, frame.rates, **choices, **drawn)

    return Context(frame.params, frame.round, phase, frame.rates, train, aggregation_key(frame.key, frame.round))


def make_client_round(method: Method, trainer: LocalTrainer) -> Callable[..., ClientUpdated]:
    """Make `run(frame, personal, client, phase=0)`, of arrays without leading axes.

    A client that is new begins with `init_client`, whatever `personal` holds.
    """

    def run(frame: Frame, personal: PyTree, client: Client, phase: int = 0) -> ClientUpdated:
        number, fold = client.number, partial(_fold, frame.key, frame.round)
        with jax.named_scope("start_clients"):
            fresh = start_personal(method, frame.key, frame.server, number)
            personal = tree.choose(client.new, fresh, personal)
        drops = jax.random.fold_in(fold(Stream.DROPOUT), number) if trainer.draws else None
        new, message, metrics = method.client_update(
            make_context(trainer, frame, phase, drops),
            server=frame.server,
            personal=personal,
            client=client,
            key=jax.random.fold_in(fold(Stream.UPDATES), number),
        )
        with jax.named_scope("look_for_numbers_that_are_not_finite"):
            finite = tree.is_finite((new, message, metrics["loss"]))
            new, message = tree.choose(finite, (new, message), (personal, jax.tree.map(jnp.zeros_like, message)))
        return ClientUpdated(new, message, metrics, finite)

    return run


def start_personal(method: Method, key: PRNGKeyArray, server: PyTree, number: Number) -> PyTree:
    """Make the state that client `number` begins with; `key` is the run's, the same in every round."""
    key = jax.random.fold_in(jax.random.fold_in(key, Stream.NEWCOMERS), number)
    return method.init_client(key=key, server=server, number=number)


def aggregation_key(key: PRNGKeyArray, round_: Number) -> PRNGKeyArray:
    """Fold the key of what the server draws in a round from the run's."""
    fold = partial(_fold, key, round_)
    return fold(Stream.AGGREGATION)


def _fold(key: PRNGKeyArray, round_: Number, stream: Stream) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(key, stream), round_)
