"""The record that a federated method is: a few pure functions, nothing that the engine would have to know by name.

What `client_update` returns as its *message* is all that `aggregate` ever sees of a client. Byte counts, and later
privacy and compression, act on messages, so a message is an *update* (a difference to what the server sent), never the
value itself. Axes: K clients of the cohort, M rows, S local steps, B batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora

__all__ = ["Client", "Context", "Method", "Metrics", "Setup"]

Metrics = dict[str, Array]
AnyArray = Any  # a jax.Array on the device in a round, a numpy array before it
Server = PyTree
Personal = PyTree
Message = PyTree


class Client(NamedTuple):
    """One client as its update sees it; in the engine every leaf has leading axes.

    Attributes:
        examples: this round's rows, a dict of arrays [M, …]: the model's batch, row by row.
        indices: [S, B], which rows each local step reads.
        mask: [S, B], which of them count. A step in which none does changes nothing.
        weight: its share of the average, p_k (Σ p_k = 1 over the cohort); 0 for padding and for clients that drop out.
        number: its place in the population.
        new: does it take part for the first time?
    """

    examples: Mapping[str, AnyArray]
    indices: Int[AnyArray, "steps batch"]
    mask: Bool[AnyArray, "steps batch"]
    weight: Float[AnyArray, ""]
    number: Int[AnyArray, ""]
    new: Bool[AnyArray, ""]


class Context(NamedTuple):
    """What a method may use in a round.

    Attributes:
        params: the frozen base.
        round: the round's number, from 1.
        rates: traced hyperparameters: learning rates `a` and `b`.
        train: (adapter, optimiser state, client) -> (adapter, optimiser state, metrics): S local steps.
    """

    params: PyTree
    round: Int[Array, ""]
    rates: dict[str, Float[Array, ""]]
    train: Callable[[lora.Adapter, PyTree, Client], tuple[lora.Adapter, PyTree, Metrics]]


class Setup(NamedTuple):
    """What a method is made with.

    Attributes:
        sites: of the model.
        draw: (key) -> a fresh adapter.
        start_optimizer: (adapter) -> a fresh optimiser state.
        keep_optimizer: does a client keep its optimiser state between its rounds?
        common_start: do all clients start from the same personal factors, or does each draw its own?
    """

    sites: lora.Sites
    draw: Callable[[PRNGKeyArray], lora.Adapter]
    start_optimizer: Callable[[lora.Adapter], PyTree]
    keep_optimizer: bool = True
    common_start: bool = True


class Method(NamedTuple):
    """A federated method.

    Attributes:
        name: as the command line knows it.
        source: where it comes from, and its update in a line.
        init: (adapter) -> server state; once.
        init_client: (key, server) -> personal state, at a client's first participation.
        client_update: (context, server, personal, client, key) -> personal, message, metrics; the engine vmaps it.
        aggregate: (context, server, messages [K, …], weights [K]) -> server, metrics; sees all messages at once.
        personalise: (server, personal) -> the adapter that the client uses.
        trained: (server before the round, personal, message) -> the adapter as the client had it when it sent its
            message: what it would use if nothing were redistributed.
        download: (server) -> the tree that a client receives; with the message, what travels.
    """

    name: str
    source: str
    init: Callable[[lora.Adapter], Server]
    init_client: Callable[[PRNGKeyArray, Server], Personal]
    client_update: Callable[[Context, Server, Personal, Client, PRNGKeyArray], tuple[Personal, Message, Metrics]]
    aggregate: Callable[[Context, Server, Message, Float[Array, " cohort"]], tuple[Server, Metrics]]
    personalise: Callable[[Server, Personal], lora.Adapter]
    trained: Callable[[Server, Personal, Message], lora.Adapter]
    download: Callable[[Server], PyTree]
