"""The host's side of a federation: a server's state on the devices, personal states on the host, a call per round.

With several processes each reads the examples and the personal states of the clients whose places in the cohort are on
its devices, round by round: the cohort is that of a single process, and so are the numbers, to rounding. All of them
know the table of states, what was measured, and who counted.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import TraceAnnotation
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.data.batches import count_steps
from fedvlm_jax.distributed.sharding import fetch, fetch_local, local_places, place_like, place_waves, replicate
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.client_states import NOBODY, ClientStates, Slots
from fedvlm_jax.federation.cohort import Layout, make_clients
from fedvlm_jax.federation.communication import count_bytes, find_travelling
from fedvlm_jax.federation.compiled import Around, Programs
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.diagnostics import OF_CLIENTS, OF_PAIRS
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.federation.memory import Footprint, count_unread, measure
from fedvlm_jax.federation.participation import draw_cohort, draw_members, draw_turnout, find_shares
from fedvlm_jax.federation.round import (
    RoundArguments,
    RoundOutput,
    from_waves,
    make_arguments,
    to_waves,
)
from fedvlm_jax.methods import Client
from fedvlm_jax.methods.base import shape_of_one
from fedvlm_jax.privacy.sampling import Sampling
from fedvlm_jax.utils.random_streams import Stream

if TYPE_CHECKING:
    from fedvlm_jax.data.tokenization import Examples  # which loads pyarrow


class RoundInputs(NamedTuple):
    """A round's inputs, on the host."""

    round: int  # its number
    numbers: Int[np.ndarray, " cohort"]  # none at all where a Poisson sample is empty
    clients: Client  # arrays [W, V, …], or of this process's places; who is new is settled when the round begins
    weights: Float[np.ndarray, " places"]  # p_k in the cohort's order
    turnout: dict[str, int]  # how many dropped out and how many straggled, where that may happen

    @property
    def counted(self) -> Int[np.ndarray, " some"]:
        """The places in the cohort of the clients that count: they have examples and did not drop out."""
        return np.flatnonzero(self.weights[: len(self.numbers)] > 0)


@dataclass(frozen=True)
class RoundReport:
    """A round that has run, on the host."""

    numbers: np.ndarray  # the cohort
    counted: np.ndarray  # the clients in it whose messages counted
    unfit: np.ndarray  # those that trained and did not count, because what came of it is not finite
    finite: bool  # whether the server's new state is, and the base where the method moves it; if not it was not taken
    turnout: dict[str, int]  # how many dropped out and how many straggled, where that may happen
    metrics: dict[str, np.ndarray]  # of every client in the cohort [K]
    selection: np.ndarray | None  # how much of each one's message went in [K], from 0 to 1, where a pool says so
    health: dict[str, float]  # of the aggregation
    bytes_up: int  # per client that counted, their mean; padding beyond a client's rank does not travel
    bytes_down: int  # per client that was drawn, for it dropped out after it had received
    # (client numbers [V] that counted) -> the adapters as these had them before aggregation, which were trained on
    # `base`; None where nothing was redistributed.
    trained: Callable[[np.ndarray], PyTree] | None
    base: PyTree
    sent: "Sent"


class Sent(NamedTuple):
    """What left the clients in a round, as it left, on the devices, and the server's state before it."""

    messages: PyTree  # [K, …], in the cohort's order, and after it the padding's
    weights: Float[np.ndarray, " places"]  # p_k as they counted
    server: PyTree


class Moment(NamedTuple):
    """A federation as it was after some round."""

    server: PyTree  # the server's state, on the host
    slots: Slots  # where the personal states of that moment are; `client_states` keeps them


@dataclass
class Simulator:
    """A federation in progress."""

    programs: Programs
    params: PyTree  # the base, on the devices
    examples: "Examples"
    inputs: Inputs
    layout: Layout
    seed: int  # decides cohorts and batches
    key: PRNGKeyArray  # decides what is drawn on the devices
    weighting: Literal["examples", "uniform"]
    server: PyTree
    ranks: Sequence[int] = ()  # of every client; empty where all have the adapter's
    participation: ParticipationOptions = field(default_factory=ParticipationOptions)
    sampling: Sampling | None = None  # how clients are drawn under differential privacy
    secret: str = ""  # hexadecimal; with `sampling` it decides cohorts in place of the seed
    hostile: Sequence[int] = ()  # clients that send other messages than their own, see `messages.attacks`
    epochs: float | None = None  # passes over a client's examples in a round; None: the layout's local steps, all alike
    tables: PyTree = None  # what the objective reads beside its batches, see `Frame`
    file: Path | None = None  # where the personal states are; a temporary file by default
    compiling: Around = nullcontext
    client_states: ClientStates = field(init=False)
    _places: Int[np.ndarray, " own"] = field(init=False, repr=False)
    _trainable: Int[np.ndarray, " some"] = field(init=False, repr=False)
    _sizes: Int[np.ndarray, " some"] = field(init=False, repr=False)
    _shares: Float[np.ndarray, " some"] = field(init=False, repr=False)
    _base: tuple[PyTree, PyTree] | None = field(default=None, init=False, repr=False)
    _left: tuple[Slots, PyTree] | None = field(default=None, init=False, repr=False)
    _traffic: dict[tuple[int, int], tuple[PyTree, PyTree]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = jax.eval_shape(
            lambda key, server: start_personal(self.programs.method, key, server, jnp.int32(0)), self.key, self.server
        )
        clients = self.examples.clients
        self.client_states = ClientStates(shapes, len(clients), self.file)
        waves = self.layout.waves  # position k of the cohort sits at wave k mod W, place k div W
        own = local_places(self.programs.mesh, self.layout.wave)
        self._places = (own[:, None] * waves + np.arange(waves)).ravel()
        # A place in a cohort is for who can fill it.
        self._trainable = np.flatnonzero([client.trains for client in clients])
        self._sizes = np.asarray([len(clients[number].train) for number in self._trainable])
        by_size = self.participation.sampling == "size" and self.layout.cohort < len(self._sizes)
        self._shares = find_shares(self._sizes, "examples" if by_size else self.weighting)
        self.server = replicate(self.programs.mesh, self.server)
        self.tables = replicate(self.programs.mesh, self.tables)

    def read_round(self, round_: int, steps: int | None = None) -> RoundInputs:
        """Draw the cohort of round `round_` (from 1) and read its data.

        Clients that are held out or have no training examples are never drawn. Fewer `steps` than the layout's leave
        out the others, in the same program.

        It depends on nothing that a round changes, so rounds may be read ahead, in other threads.
        """
        layout, options = self.layout, self.participation
        by_size = self._sizes if options.sampling == "size" else None
        if self.sampling is None:
            drawn = draw_cohort(self.seed, round_, len(self._trainable), layout.cohort, by_size)
        else:
            drawn = draw_members(int(self.secret, 16) if self.secret else self.seed, round_, self.sampling)
        cohort = len(drawn)
        if not cohort:
            drawn, steps = np.asarray([0]), 0  # somebody has to fill the places, and takes no step
        numbers = self._trainable[drawn]
        full = np.full(len(numbers), layout.steps)
        if self.epochs is not None:
            full = np.asarray([count_steps(size, self.epochs, layout.batch) for size in self._sizes[drawn].tolist()])
        full = full if steps is None else np.minimum(full, steps)
        turnout = draw_turnout(self.seed, round_, numbers, full, options)
        clients, weights = make_clients(
            self.seed, round_, numbers, self.examples, self.inputs, layout, self.weighting, turnout.steps, self._places,
            self._shares[drawn],
        )  # fmt: skip
        if self.hostile:
            clients = clients._replace(hostile=np.isin(clients.number, self.hostile))
        missing = {"dropped": int(turnout.dropped[:cohort].sum())} if options.dropout else {}
        missing |= {"stragglers": int(turnout.late[:cohort].sum())} if options.stragglers else {}
        return RoundInputs(round_, numbers[:cohort], clients, weights, missing)

    @property
    def base(self) -> PyTree:
        """The base as the method has it now; formed once per state of the server."""
        if self._base is None or self._base[0] is not self.server:
            self._base = (self.server, self.base_at(self.server))
        return self._base[1]

    def base_at(self, server: PyTree) -> PyTree:
        """Return the base as the method has it with this state of the server."""
        if self.programs.base is None:
            return self.params
        return place_like(self.programs.base(params=self.params, server=server), self.params)

    def measure_round(self, read: RoundInputs) -> Footprint:
        """Compile the round that was read, without running it; return what it needs of a device.

        Raises:
            TooLargeError: the compiler finds that it does not fit.
        """
        arguments = self._arguments(read)
        compiled = self._compile(arguments, read.round)
        return measure(
            compiled, self.base, self.programs.mesh, self.layout.wave, unread=count_unread(compiled, arguments)
        )

    def _arguments(self, read: RoundInputs, rates: dict[str, float] | None = None) -> RoundArguments:
        """Make what the compiled round takes; personal states as they are now."""
        mesh, waves, table = self.programs.mesh, self.layout.waves, self.client_states
        held = from_waves(read.clients.number)
        left, self._left = self._left, None
        if left is not None and np.array_equal(left[0], table.slots[held]):
            personal = left[1]  # the cohort is the last round's, whose states, still on the devices, are overwritten
        else:
            personal = place_waves(mesh, to_waves(table.gather(held), waves))
        return make_arguments(
            params=self.base,
            server=self.server,
            personal=personal,
            clients=place_waves(mesh, read.clients._replace(new=to_waves(~table.known[held], waves))),
            weights=jnp.asarray(read.weights),
            key=self.key,
            rates=rates,
            round_=read.round,
            tables=self.tables,
        )

    def phase_of(self, round_: int) -> int:
        """Return which of the method's programs runs round `round_`."""
        return self.programs.method.phase(round_)

    def round_text(self, round_: int) -> str:
        """Return the compiled program of round `round_`, which has run, as text."""
        compiled, phase = self.programs.compiled, self.phase_of(round_)
        return next(compiled[key] for key in reversed(compiled) if key[0] == phase).as_text()

    def _compile(self, arguments: RoundArguments, round_: int) -> Any:
        return self.programs.compile_round(arguments, self.phase_of(round_), self.compiling)

    def _run(self, read: RoundInputs, rates: dict[str, float] | None = None) -> RoundOutput:
        with TraceAnnotation("give the program its arguments"):
            arguments = self._arguments(read, rates)
        with TraceAnnotation("start the compiled round"):
            return self._compile(arguments, read.round)(*arguments)

    def run_round(self, read: RoundInputs, rates: dict[str, float]) -> RoundReport:
        """Run a round that was read: train its cohort, aggregate, write personal states back.

        Whoever does not count leaves no trace: its state stays, and if it had none it is as new next time. Where nobody
        counts the server stays too; and everything stays where the aggregate is not finite.
        """
        numbers, before, base, programs = read.numbers, self.server, self.base, self.programs
        out = self._run(read, rates)
        health = dict(out.health)
        selection = health.pop("selection", None)
        found = programs.health(before, out.personal, out.messages, out.weights) if len(read.counted) else {}
        with TraceAnnotation("wait for the round"):
            weights = fetch(out.weights)
            counted = np.flatnonzero(weights[: len(numbers)] > 0)
        # Finite factors may overflow in their product, so a base that the method moves is looked at itself.
        finite = bool(out.finite) and (programs.base is None or bool(programs.base_is_finite(self.params, out.server)))
        if len(counted):
            health = health | (found if len(counted) > 1 else {k: v for k, v in found.items() if k not in OF_PAIRS})
        else:
            health = {name: value for name, value in health.items() if name not in OF_CLIENTS}
        if finite:
            if len(counted):
                with TraceAnnotation("store personal states"):
                    self._store(numbers[counted], counted, out.personal)
            self.server = out.server  # where nobody counts the same, unless noise has to be released all the same
        up, down = self._travelling(out.messages, max(1, len(counted)), read.round)
        redistributed = len(counted) > 0 and len(jax.tree.leaves(out.messages)) > 0
        return RoundReport(
            numbers=numbers,
            counted=numbers[counted],
            unfit=numbers[np.setdiff1d(read.counted, counted)],
            finite=finite,
            turnout=read.turnout,
            metrics={name: values[: len(numbers)] for name, values in fetch(out.metrics).items()},
            selection=None if selection is None else np.where(weights > 0, fetch(selection), 0)[: len(numbers)],
            health={name: float(value) for name, value in health.items()},
            bytes_up=self._count_bytes(up, numbers[counted]),
            bytes_down=self._count_bytes(down, numbers),
            trained=self._trained(before, numbers, out.messages) if redistributed else None,
            base=base,
            sent=Sent(out.messages, weights, before),
        )

    def find_messages(self, read: RoundInputs) -> PyTree:
        """Find the shapes of a client's message in the round that was read; nothing is computed."""
        run = partial(self.programs.round, phase=self.phase_of(read.round))
        return shape_of_one(jax.eval_shape(run, *self._arguments(read)).messages)

    def find_unfit(self, read: RoundInputs) -> Int[np.ndarray, " some"]:
        """Run a round once more at learning rates of 0, which changes nothing: who is unfit then always is."""
        out = self._run(read)
        lost = np.setdiff1d(read.counted, np.flatnonzero(fetch(out.weights)[: len(read.numbers)] > 0))
        return read.numbers[lost]

    def _store(self, numbers: np.ndarray, places: np.ndarray, states: PyTree) -> None:
        """Keep the states [W, V, …] of these clients, who stand at these places of the cohort."""
        own = np.flatnonzero(np.isin(places, self._places))
        held = from_waves(fetch_local(states))
        whole = len(own) == len(self._places)  # all of them are kept, in their order, and none is copied
        if not whole:
            rows = np.searchsorted(self._places, places[own])
            held = jax.tree.map(lambda x: x[rows], held)
        self.client_states.scatter(numbers, held, own)
        self.client_states.meet()
        if whole and len(numbers) == len(self._trainable):  # everybody, who will be the next round's cohort too
            self._left = self.client_states.slots[numbers[own]], states

    def _travelling(self, messages: PyTree, senders: int, round_: int) -> tuple[PyTree, PyTree]:
        """Return shapes of what a client sends and receives, where so many clients sent something."""
        key = (self.phase_of(round_), senders)
        if key not in self._traffic:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((senders, *x.shape[1:]), x.dtype), messages)
            server = jax.eval_shape(lambda state: state, self.server)
            self._traffic[key] = find_travelling(self.programs.method, server, shapes)
        return self._traffic[key]

    def _count_bytes(self, part: PyTree, numbers: np.ndarray) -> int:
        """Count the bytes of a client, the mean over these; 0 where there are none."""
        if not len(numbers):
            return 0
        share = float(np.mean([self.ranks[number] for number in numbers])) / max(self.ranks) if self.ranks else 1.0
        return count_bytes(part, share)

    @property
    def now(self) -> Moment:
        """The federation as it stands."""
        return Moment(self.server, self.client_states.slots)

    def adapters(self, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """Make the personalised adapters of these clients [V, …], now or at another moment."""
        slots = (at or self.now).slots
        return self.personalise(self.client_states.gather(numbers, slots), slots[numbers] != NOBODY, numbers, at)

    def global_adapters(self, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """Make adapters [V, …] of the shared part and the private part that each of these clients started from."""
        states = self.client_states.gather(numbers, (at or self.now).slots)
        return self.personalise(states, np.zeros(len(numbers), bool), numbers, at)

    def start_states(self, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """Make the states [V, …] that these clients begin with, on the host, now or at another moment."""
        return fetch(self.programs.start(self.key, (at or self.now).server, np.asarray(numbers, np.int32)))

    def personalise(self, states: PyTree, known: np.ndarray, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """Make adapters of the shared part and these states [V, …], or the initial ones where not `known` [V]."""
        server = (at or self.now).server
        return self.programs.personalise(server, states, known, np.asarray(numbers, np.int32), self.key)

    def _trained(self, before: PyTree, cohort: np.ndarray, messages: PyTree) -> Callable[[np.ndarray], PyTree]:
        @cache
        def held() -> PyTree:  # on the host: taken leaf by leaf on several processes' devices they could wait for ever
            return fetch(messages)

        def adapters(numbers: np.ndarray) -> PyTree:
            at = np.searchsorted(cohort, numbers)
            own = jax.tree.map(lambda x: x[at], held())
            return self.programs.trained(before, self.client_states.gather(numbers), own)

        return adapters

    def state(self) -> PyTree:
        """Return what changes, for a checkpoint: the personal states as their places and what wrote them there."""
        client_states = self.client_states
        return {"server": self.server, "slots": client_states.slots.copy(), "stamps": client_states.stamps()}

    def load(self, state: PyTree) -> None:
        """Go on from a state that `state` returned."""
        self.server = replicate(self.programs.mesh, state["server"])
        self.client_states.load(state["slots"], state["stamps"])
        self._left = None


def start_adapter(key: PRNGKeyArray, sites: lora.Sites, spec: lora.LoRA) -> lora.Adapter:
    """Draw the adapter that a run starts from; it depends on the seed alone, so that methods start alike."""
    return lora.init(jax.random.fold_in(key, Stream.ADAPTER), sites, spec)
