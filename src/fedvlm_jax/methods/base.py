"""The record that a federated method is: a few pure functions, nothing that the engine would have to know by name.

What `client_update` returns as its *message* is all that `aggregate` ever sees of a client. Byte counts, and later
privacy and compression, act on messages, so a message is an *update* (a difference to what the server sent) wherever
the method has such a thing. Axes: K clients of the cohort, M rows, S local steps, B batch, R rank.

The fields of `Method` after `download` are for methods that need more than one adapter that is partly averaged: the
others leave them alone.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.config import HyperOptions, LocalOptions, ServerOptions

__all__ = ["Client", "Context", "Method", "Metrics", "Setup", "Train", "is_factor"]

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
        mask: [S, B], which of them count. A step in which none does changes nothing; such steps come last.
        weight: its share of the average, p_k (Σ p_k = 1 over the cohort); 0 for padding and for clients that drop out.
        number: its place in the population.
        new: does it take part for the first time?
        share: its share of all clients' weight, Σ = 1 over those that can be drawn, whoever is in the cohort.
    """

    examples: Mapping[str, AnyArray]
    indices: Int[AnyArray, "steps batch"]
    mask: Bool[AnyArray, "steps batch"]
    weight: Float[AnyArray, ""]
    number: Int[AnyArray, ""]
    new: Bool[AnyArray, ""]
    share: Float[AnyArray, ""]


class Train(Protocol):
    """S local steps on a tree of factors."""

    def __call__(
        self,
        factors: PyTree,
        optimizer: PyTree,
        client: Client,
        *,
        trained: Callable[[str], bool] = ...,
        assemble: Callable[[PyTree], lora.Adapter] = ...,
        nudge: Callable[[PyTree], PyTree] | None = None,
        first: Int[Array, ""] | int = 0,
    ) -> tuple[PyTree, PyTree, Metrics]:
        """Train.

        Args:
            factors: the tree that holds what is trained; an adapter, unless `assemble` says how to make one of it.
            optimizer: its state, for the same `trained`.
            client: whose data.
            trained: which leaves, by path; the others stay. By default `is_factor`.
            assemble: (factors) -> the adapter that the model runs with.
            nudge: (trained leaves) -> what is added to their gradient, a tree of the same form: a proximal term's
                gradient, a control variate.
            first: the number of its first step, where a loop of the method's own asks for one step at a time: what
                dropout leaves out depends on it.

        Returns:
            The tree after training, the optimiser's state, and metrics: `loss` and what else the objective tells, and
            `gradient_norm`, as means over the steps that counted; `last_loss`; and `steps`, how many counted. Those of
            several trainings in a row are joined by `methods.parts.metrics.over_steps`.
        """
        ...


class Context(NamedTuple):
    """What a method may use in a round.

    Attributes:
        params: the frozen base, with what `Method.base` adds to it.
        round: the round's number, from 1.
        phase: of the round, a Python integer.
        rates: traced hyperparameters: learning rates `a` and `b`.
        train: local training.
    """

    params: PyTree
    round: Int[Array, ""]
    phase: int
    rates: dict[str, Float[Array, ""]]
    train: Train


class Setup(NamedTuple):
    """What a method is made with.

    Attributes:
        sites: of the model.
        draw: (key) -> a fresh adapter.
        start_optimizer: (factors, trained) -> a fresh optimiser state for the leaves that `trained` names.
        keep_optimizer: does a client keep its optimiser state between its rounds?
        common_start: do all clients start from the same personal factors, or does each draw its own?
        population: clients that there are.
        cohort: clients that a round has at most.
        places: of a round, with a message at each: the cohort and what fills up its waves, so devices decide it.
        rounds: that the run will have.
        local_steps: of a client in a round at most; 0 while the data, which will tell, is not read.
        ranks: of every client, or empty where all have the adapter's own; padded to it, so that shapes are equal.
        local, server, hyper: options of local training, of the server's optimiser, and of single methods.
        share: the rule of the method `share`.
    """

    sites: lora.Sites
    draw: Callable[[PRNGKeyArray], lora.Adapter]
    start_optimizer: Callable[..., PyTree]
    keep_optimizer: bool = True
    common_start: bool = True
    population: int = 1
    cohort: int = 1
    places: int = 1
    rounds: int = 1
    local_steps: int = 0
    ranks: Sequence[int] = ()
    local: LocalOptions = LocalOptions()
    server: ServerOptions = ServerOptions()
    hyper: HyperOptions = HyperOptions()
    share: str = ""

    def kept(self, optimizer: PyTree) -> dict[str, PyTree]:
        """Return what a client's state has of an optimiser: its state under "optimizer", or nothing."""
        return {"optimizer": optimizer} if self.keep_optimizer else {}


def is_factor(path: str) -> bool:
    """Does the path end in a factor of an adapter? What is trained unless a method says otherwise."""
    return path.rpartition("/")[2] in ("a", "b")


class Method(NamedTuple):
    """A federated method.

    What makes one computes nothing and asks nothing of the model: it is also called to read what the method takes. It
    may raise `UserError` for a setup that it cannot work with, which ends a run before anything is loaded.

    Attributes:
        name: as the command line knows it, its file's with hyphens.
        source: where it comes from, and its update in a line.
        init: (adapter) -> server state; once.
        init_client: (key, server, number) -> personal state, at a client's first participation.
        client_update: (context, server, personal, client, key) -> personal, message, metrics; the engine vmaps it.
        aggregate: (context, server, messages [K, …], weights [K]) -> server, metrics; sees all messages at once, also
            those of clients with weight 0, whatever they hold. If all weights are 0 the server must stay as it is.
        personalise: (server, personal) -> the adapter that the client uses.
        trained: (server before the round, personal as `client_update` returned it, message) -> the adapter as the
            client had it at the end of its local training: what it would use if nothing were redistributed.
        download: (server) -> the tree that every client receives; with the message, what travels.
        base: (params, server) -> params, once per round and outside of vmap; None: the base stays.
        phase: (round) -> an integer; rounds of one phase share a program. None: there is one phase.
        travels: (server, messages [K, …], all shapes) -> two trees of shapes: what a client sends, what it receives;
            None: its message, and `download`.
        mixes: does each client receive something of its own, which the server mixes for it?
        pairs: of factors of one rank that stand side by side in the adapters that it assembles, in the same order for
            everybody: 2 for a global beside a local one. A's of different clients are compared pair by pair.
        takes: the options that not every method takes and this one does, as `Run` names them: `server`,
            `local.proximal`, `local.scaffold`, `lora.ranks`, `share`, and the fields of `hyper` that it reads,
            `hyper.ditto_lambda` say. The others are refused.
        refuses: such an option -> why not, to be read after "because"; or `train.weighting`, which others take unasked.
        moot: those of them that would merely do nothing: a comparison, in which others take them, leaves them out here.
    """

    name: str
    source: str
    init: Callable[[lora.Adapter], Server]
    init_client: Callable[[PRNGKeyArray, Server, Int[Array, ""]], Personal]
    client_update: Callable[[Context, Server, Personal, Client, PRNGKeyArray], tuple[Personal, Message, Metrics]]
    aggregate: Callable[[Context, Server, Message, Float[Array, " cohort"]], tuple[Server, Metrics]]
    personalise: Callable[[Server, Personal], lora.Adapter]
    trained: Callable[[Server, Personal, Message], lora.Adapter]
    download: Callable[[Server], PyTree]
    base: Callable[[PyTree, Server], PyTree] | None = None
    phase: Callable[[int], int] | None = None
    travels: Callable[[Server, Message], tuple[PyTree, PyTree]] | None = None
    mixes: bool = False
    pairs: int = 1
    takes: frozenset[str] = frozenset()
    refuses: Mapping[str, str] = MappingProxyType({})
    moot: frozenset[str] = frozenset()
