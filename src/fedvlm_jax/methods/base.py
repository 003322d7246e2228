"""The record of a federated method: a few pure functions, and nothing that the engine would have to know by name.

The *message* that `client_update` returns is all that `aggregate` ever sees of a client. Byte counts, and later privacy
and compression, act on messages, so a message is an *update* (a difference to what the server sent) wherever the method
has such a thing. Axes: K clients of the cohort, M rows, S local steps, B batch, R rank.

Each function of the record has a Protocol here, which says what it may read and what comes back. The engine calls all
of them with keywords.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.adapter import BOTTLENECK, PARALLEL
from fedvlm_jax.methods.config import LocalOptions, MethodOptions, ServerOptions

Metrics = dict[str, Array]
AnyArray = Any  # a jax.Array on the device in a round, a numpy array before it
Weights = Float[Array, " cohort"]
Held = Float[Array, "cohort rank"]  # 1 where a client of the cohort has a direction of the factors, 0 where it has not
Number = Int[Array, ""]
Key = PRNGKeyArray
Updated = tuple[PyTree, PyTree, Metrics]  # a client's new personal state, its message, metrics
Aggregated = tuple[PyTree, Metrics]  # the server's new state, metrics
Travelling = tuple[PyTree, PyTree]  # shapes of what a client sends and of what it receives
Numbers = TypeVar("Numbers", bound=MethodOptions)

AVERAGING = ("server", "local.proximal", "local.scaffold", "lora.ranks")
"""The options that come with an average of updates, as `Run` names them; `server` stands for all of the server's."""


class Client(NamedTuple):
    """A client as its update sees it; in the engine every leaf has leading axes.

    Attributes:
        examples: this round's rows, a dict of arrays [M, …]: the model's batch, row by row.
        indices: [S, B], the rows that each local step reads.
        mask: [S, B], which of them count. A step in which none does changes nothing; such steps come last.
        weight: p_k, its weight in the average (Σ p_k = 1 over the cohort); 0 for padding and for drop-outs.
        number: its place in the population.
        new: whether it takes part for the first time.
        share: its share of all clients' weight, Σ = 1 over those that can be drawn, whoever is in the cohort.
        hostile: whether it is a simulated attacker; None where nobody changes messages.
    """

    examples: Mapping[str, AnyArray]
    indices: Int[AnyArray, "steps batch"]
    mask: Bool[AnyArray, "steps batch"]
    weight: Float[AnyArray, ""]
    number: Int[AnyArray, ""]
    new: Bool[AnyArray, ""]
    share: Float[AnyArray, ""]
    hostile: Bool[AnyArray, ""] | None = None


class Distillation(NamedTuple):
    """A teacher of local training, whose answers the trained adapter shall give too.

    Attributes:
        teacher: the adapter; it is not trained by this, and has no dropout.
        weight: of the distance from the teacher in what is minimised; the objective has the rest.
        temperature: that both distributions are softened by.
    """

    teacher: lora.Adapter
    weight: float = 0.5
    temperature: float = 1.0


class Train(Protocol):
    """Take S local steps on a tree of factors: -> the tree, the optimiser's state, metrics.

    The metrics are means over the steps that counted, `loss` and the objective's others and `gradient_norm`; then
    `last_loss`; and `steps`, how many counted. `components.training_metrics.over_steps` joins several trainings'.

    Args:
        factors: holds what is trained; an adapter, unless `assemble` makes one of it.
        optimizer: its state, for the same `trained`.
        client: has the data.
        trained: (path) -> whether the leaf is trained; the others stay. By default `is_factor`.
        assemble: (factors) -> the adapter that the model runs with.
        nudge: (trained leaves) -> a tree of the same form that is added to their gradient: a proximal term's
            gradient, a control variate.
        first: the number of its first step, where a method asks for one step at a time: dropout masks depend on it.
        distil: what is minimised is the objective and the distance from a teacher, which is the metric `distillation`.
    """

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
        distil: Distillation | None = None,
    ) -> tuple[PyTree, PyTree, Metrics]: ...


class Context(NamedTuple):
    """The round, as a method's functions see it.

    Attributes:
        params: the frozen base, with what `Method.base` adds to it.
        round: the round's number, from 1.
        phase: of the round, a Python integer.
        rates: traced hyperparameters: learning rates `a` and `b`.
        train: local training; not for `aggregate`.
        key: for random numbers of `aggregate` alone, such as noise; every round has another. A client has its own.
        numbers: [K] in `aggregate`: the clients that the messages are of; None elsewhere. Padding repeats one of them
            with weight 0, so a table by client is set at `jnp.where(weights > 0, numbers, population)`, mode "drop".
        held: [K, R] in `aggregate` where ranks differ: 1 where a client of the cohort has a direction of the factors, 0
            where its message is zero there; None where all clients have all.
    """

    params: PyTree
    round: Number
    phase: int
    rates: dict[str, Float[Array, ""]]
    train: Train
    key: Key
    numbers: Int[Array, " cohort"] | None = None
    held: Held | None = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A method's surroundings: the model's sites, the run's sizes and options.

    Attributes:
        sites, spec: of the model, and the form of the adapter.
        start_optimizer: (factors, trained) -> a fresh optimiser state for the leaves that `trained` names.
        keep_optimizer: whether a client keeps its optimiser state between its rounds.
        common_start: whether all clients start from the same personal factors; otherwise each draws its own.
        population, cohort: clients in all, and in a round at most.
        trainable: clients that can be drawn; None: all.
        places: of a round, with a message at each: the cohort and what fills up its waves, so devices decide it.
        rounds: that the run will have.
        local_steps: of a client in a round at most; 0 while the data, on which it depends, is not read.
        ranks: of every client, or empty where all have the adapter's; padded to it, so that shapes are equal.
        local, server: options of local training and of the server's optimiser.
        options: the method's numbers, see `own`.
        components: parts of the model, name -> regular expression of paths (`Vlm.components`); empty where unknown.
        width: numbers of an image token, or of an embedding of a picture and a class (`Vlm.image_width`); 0 while no
            model is known.
        texts: (params, adapter) -> embeddings of the classes that are trained among (`Vlm.texts`); None where the model
            chooses among none, or is not known.
    """

    sites: lora.Sites
    spec: lora.LoRA
    start_optimizer: Callable[..., PyTree]
    keep_optimizer: bool = True
    common_start: bool = True
    population: int = 1
    trainable: int | None = None
    cohort: int = 1
    places: int = 1
    rounds: int = 1
    local_steps: int = 0
    ranks: Sequence[int] = ()
    local: LocalOptions = field(default_factory=LocalOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    options: MethodOptions = field(default_factory=MethodOptions)
    components: Mapping[str, str] = field(default_factory=dict)
    width: int = 0
    texts: Callable[[PyTree, PyTree], Array] | None = None

    def draw(self, key: Key) -> lora.Adapter:
        """Draw a fresh adapter."""
        return lora.init(key, self.sites, self.spec)

    def own(self, kind: type[Numbers]) -> Numbers:
        """Return the method's numbers, which are of this kind; its defaults where none were given.

        Raises:
            TypeError: they are another method's.
        """
        if type(self.options) is MethodOptions:
            return kind()
        if not isinstance(self.options, kind):
            raise TypeError(f"{self.options} are another method's: expected {kind}")
        return self.options

    def kept(self, optimizer: PyTree) -> dict[str, PyTree]:
        """Return what a client's state has of an optimiser: its state under "optimizer", or nothing."""
        return {"optimizer": optimizer} if self.keep_optimizer else {}


def is_factor(path: str) -> bool:
    """Return whether the path ends in a factor of an adapter: what is trained unless a method says otherwise.

    That are the factors of low rank, a soft prompt, and the matrices of bottlenecks and of adapters beside layers.

    >>> is_factor("encoder/fc1/a"), is_factor("text_model/token_embedding/prompt"), is_factor("encoder/fc1/scale")
    (True, True, False)
    """
    return path.rpartition("/")[2] in _FACTORS


_FACTORS = frozenset(("a", "b", lora.PROMPT, *BOTTLENECK, *PARALLEL))


def shape_of_one(stacked: PyTree) -> PyTree:
    """Return the shapes of one client's part of [K, …].

    >>> shape_of_one({"b": jax.ShapeDtypeStruct((3, 4, 2), "float32")})
    {'b': ShapeDtypeStruct(shape=(4, 2), dtype=float32)}
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)


class Init(Protocol):
    """Make the server's state, a tree of arrays whose shapes never change, of the adapter that a run starts from."""

    def __call__(self, *, adapter: lora.Adapter) -> PyTree: ...


class InitClient(Protocol):
    """Make the personal state of client `number` at its first participation; its shapes never change.

    `key` is the client's, the same whenever it begins; `server` is the state before that round.
    """

    def __call__(self, *, key: Key, server: PyTree, number: Number) -> PyTree: ...


class ClientUpdate(Protocol):
    """Train one client: -> its personal state, its message, metrics (scalars, of which `loss` must be one).

    The engine vmaps it. `key` is of this client in this round. A client of which no step counts keeps its state.
    """

    def __call__(self, ctx: Context, *, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated: ...


class Aggregate(Protocol):
    """Make the server's state after a round: -> state, metrics (scalars).

    It sees all `messages` [K, …] at once, also those of clients with weight 0, whatever they hold. If all `weights` [K]
    are 0 the server must stay as it is.
    """

    def __call__(self, ctx: Context, *, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated: ...


class Personalise(Protocol):
    """Make the adapter that a client uses."""

    def __call__(self, *, server: PyTree, personal: PyTree) -> lora.Adapter: ...


class Trained(Protocol):
    """Make the adapter as the client had it at the end of its local training: its own if nothing were redistributed.

    `server` is the state before the round, `personal` and `message` are as `client_update` returned them.
    """

    def __call__(self, *, server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter: ...


class Download(Protocol):
    """Select the tree that every client receives, unless `travels` says otherwise.

    A run stores it as what is shared; where it is empty there is no global model to evaluate.
    """

    def __call__(self, *, server: PyTree) -> PyTree: ...


class Broadcast(Protocol):
    """Select what client `number` needs of the server's state to begin, to train and to use its model.

    It is complete: with the state that a run starts from, which the seed tells, `view` makes of it all that the
    client's functions read. So it is what travels to a client over a network, and to one that missed some rounds.
    `last` is the message that the client's last update sent, None before it has sent any; only a method that mixes
    reads it.
    """

    def __call__(self, *, server: PyTree, number: Number, last: PyTree | None) -> PyTree: ...


class View(Protocol):
    """Make the server's state as a client may see it, of the run's `start` (see `Init`) and what it received.

    `init_client`, `client_update`, `personalise`, `trained` and `base` return with it what they do with the server's.
    """

    def __call__(self, *, start: PyTree, received: PyTree) -> PyTree: ...


class Base(Protocol):
    """Add to the base what the server's state has for it; once per round and outside of vmap."""

    def __call__(self, *, params: PyTree, server: PyTree) -> PyTree: ...


class Travels(Protocol):
    """Return what a client sends and what it receives, two trees of shapes; `messages` [K, …] are shapes too."""

    def __call__(self, *, server: PyTree, messages: PyTree) -> Travelling: ...


def broadcast_parts(*names: str) -> Broadcast:
    """Make a `Broadcast` of parts of the server's state, the same for all clients.

    >>> broadcast_parts("shared")(server={"shared": 1, "optimizer": 2}, number=0, last=None)
    {'shared': 1}
    """

    def broadcast(server: PyTree, number: Number, last: PyTree | None) -> PyTree:
        del number, last
        return {name: server[name] for name in names}

    return broadcast


def replace_received(start: PyTree, received: PyTree) -> PyTree:
    """Put what a client received in place of what the run started from: the `View` of most methods.

    >>> replace_received({"shared": 0, "start": 3}, {"shared": 1})
    {'shared': 1, 'start': 3}
    """
    return {**start, **received}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated method.

    Making one computes nothing and asks nothing of the model: it is also made to read what the method refuses. That
    may raise `UserError` for a setup that it cannot work with, which ends a run before anything is loaded.

    Attributes:
        name: as the command line knows it, its file's with hyphens.
        source: where it comes from, and its update in a line.
        init, init_client, client_update, aggregate, personalise, trained, download: see their Protocols.
        broadcast, view: see their Protocols; by default everything that the server holds.
        linear: whether `aggregate` needs the weighted mean of the messages alone: given that as a single message of
            weight 1 it makes the same state, so the server need not see what a single client sent.
        base: see `Base`; None: the base stays.
        phase: (round) -> an integer; rounds of one phase share a program, by default all.
        travels: see `Travels`; None: a client sends its message and receives `download`.
        split: (factors) -> the part of them that is shared, in the form of `download`, and the rest. For wrappers of
            methods whose message is the update of that part, or of the leaves of it that the round trains.
        mixes: whether each client receives another download, which the server mixes for it.
        pairs: of factors of one rank that stand side by side in the adapters that it assembles, in the same order for
            everybody: 2 for a global beside a local one. A's of different clients are compared pair by pair.
        refuses: what it does not take of `AVERAGING`, the options that come with an average, all of them unless it says
            otherwise, of `train.weighting`, of `start`, an adapter to begin with, of `privacy`, `participation.attack`
            and `messages`, which act on messages, of `top-k`, messages of which a part comes later, of `audit.keep`,
            to keep what is sent, of `samples`, objectives that draw answers, and of `lora.targets`, low-rank factors
            beside a soft prompt -> why not, to be read after "because".
        moot: those of them that would merely do nothing: a comparison, in which others take them, leaves them out here.
        prompt: whether the adapters that it makes may have a soft prompt, which it then treats as its factors, or must.
        parallel: whether its adapters stand beside whole layers of both towers (`lora.parallel`), of the run's rank,
            and nowhere else.
        classes: whether it is for models that choose among classes alone; so is what needs a soft prompt.
        patches: whether its adapters' head compares patches of pictures.
        unreached: what of the method none of the setup's rounds comes to, and why: a sentence that is told before a run
            trains, empty where there is nothing. It is no refusal, for a run may be trained longer.
        objective: the one that it was published with, where that is not any; a run with another is told so.
    """

    name: str
    source: str
    init: Init
    init_client: InitClient
    client_update: ClientUpdate
    aggregate: Aggregate
    personalise: Personalise
    trained: Trained
    download: Download
    broadcast: Broadcast = lambda server, number, last: server
    view: View = replace_received
    linear: bool = False
    base: Base | None = None
    phase: Callable[[int], int] = lambda round_: 0
    travels: Travels | None = None
    split: Callable[[PyTree], tuple[PyTree, PyTree]] | None = None
    mixes: bool = False
    pairs: int = 1
    refuses: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys(AVERAGING, "the method was not written for it")
    )
    moot: frozenset[str] = frozenset()
    prompt: Literal["refused", "taken", "needed"] = "refused"
    parallel: bool = False
    classes: bool = False
    patches: bool = False
    unreached: str = ""
    objective: str = ""
