"""The host's side of a federation: which method stands where, and one call per round.

A federation in progress is the server's state on the devices, the personal states on the host, and a compiled round.

With several processes each reads the examples and the personal states of the clients whose places in the cohort are on
its own devices, round by round: the cohort is that of a single process, and so are the numbers, to rounding. All of
them know the table of states, what was measured, and who counted.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import TraceAnnotation
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.data.batches import count_steps
from fedvlm_jax.data.encode import Examples
from fedvlm_jax.federation.cohort import Layout, draw_cohort, draw_turnout, find_fillers, find_shares, make_clients
from fedvlm_jax.federation.health import OF_PAIRS
from fedvlm_jax.federation.inputs import Inputs
from fedvlm_jax.federation.memory import Footprint, count_unread, measure
from fedvlm_jax.federation.options import ParticipationOptions
from fedvlm_jax.federation.population import NOBODY, Population, Slots
from fedvlm_jax.federation.programs import Around, Programs
from fedvlm_jax.federation.round import RoundOutput, from_waves, start_personal, to_waves
from fedvlm_jax.federation.traffic import count_bytes, find_travelling
from fedvlm_jax.methods import Client
from fedvlm_jax.sharding import fetch, fetch_own, own_places, place_like, place_waves, replicate
from fedvlm_jax.streams import Stream

__all__ = ["Driver", "Moment", "RoundInputs", "RoundReport", "start_adapter"]


class RoundInputs(NamedTuple):
    """What a round reads, on the host.

    Attributes:
        round: its number.
        numbers: the cohort.
        clients: arrays [W, V, …], or of this process's places alone; who is new is settled when the round begins.
        weights: [K], p_k in the cohort's order.
        turnout: how many dropped out and how many straggled, where that may happen.
    """

    round: int
    numbers: Int[np.ndarray, " cohort"]
    clients: Client
    weights: Float[np.ndarray, " places"]
    turnout: dict[str, int]

    @property
    def counted(self) -> Int[np.ndarray, " some"]:
        """Places in the cohort of the clients that count: they have examples and did not drop out."""
        return np.flatnonzero(self.weights[: len(self.numbers)] > 0)


@dataclass(frozen=True)
class RoundReport:
    """What is left of a round on the host.

    Attributes:
        numbers: the cohort.
        counted: the clients in it whose messages counted.
        unfit: those that trained and did not count, because what came of it is not finite.
        finite: is the new state of the server, and of the base where the method moves it? If not it was not taken.
        turnout: how many dropped out and how many straggled, where that may happen.
        metrics: of every client in the cohort [K].
        health: of the aggregation.
        bytes_up: per client that counted, their mean; padding beyond a client's rank does not travel.
        bytes_down: per client that was drawn, for it dropped out after it had received.
        trained: (client numbers [V] that counted) -> the adapters as these clients had them before aggregation; None
            where nothing was redistributed.
        base: what these adapters were trained on.
    """

    numbers: np.ndarray
    counted: np.ndarray
    unfit: np.ndarray
    finite: bool
    turnout: dict[str, int]
    metrics: dict[str, np.ndarray]
    health: dict[str, float]
    bytes_up: int
    bytes_down: int
    trained: Callable[[np.ndarray], PyTree] | None
    base: PyTree


class Moment(NamedTuple):
    """A federation as it was after some round.

    Attributes:
        server: the server's state, on the host.
        slots: where the personal states of then are; the population keeps them.
    """

    server: PyTree
    slots: Slots


@dataclass
class Driver:
    """A federation in progress.

    Attributes:
        programs: of the method.
        params: the base, on the devices.
        examples, inputs: the clients' data.
        layout: the rounds' shapes.
        seed: decides cohorts and batches.
        key: the run's key; decides what is drawn on the device.
        weighting: how clients count.
        server: the server's state.
        ranks: of every client; empty where all have the adapter's.
        participation: who is drawn, and how far they come.
        epochs: a client trains so often on its own examples; None: the layout's local steps, all alike.
        file: where the personal states are; a temporary file by default.
        compiling: is entered while a round is compiled.
        population: the personal states.
    """

    programs: Programs
    params: PyTree
    examples: Examples
    inputs: Inputs
    layout: Layout
    seed: int
    key: PRNGKeyArray
    weighting: Literal["examples", "uniform"]
    server: PyTree
    ranks: Sequence[int] = ()
    participation: ParticipationOptions = field(default_factory=ParticipationOptions)
    epochs: float | None = None
    file: Path | None = None
    compiling: Around = nullcontext
    population: Population = field(init=False)
    _own: Int[np.ndarray, " own"] = field(init=False, repr=False)
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
        self.population = Population(shapes, len(clients), self.file)
        waves = self.layout.waves  # position k of the cohort sits at wave k mod W, place k div W
        own = own_places(self.programs.mesh, self.layout.wave)
        self._own = (own[:, None] * waves + np.arange(waves)).ravel()
        # A place in a cohort is for who can fill it.
        self._trainable = np.flatnonzero([not client.held_out and len(client.train) > 0 for client in clients])
        self._sizes = np.asarray([len(clients[number].train) for number in self._trainable])
        by_size = self.participation.sampling == "size" and self.layout.cohort < len(self._sizes)
        self._shares = find_shares(self._sizes, "examples" if by_size else self.weighting)
        self.server = replicate(self.programs.mesh, self.server)

    def read_round(self, round_: int, steps: int | None = None) -> RoundInputs:
        """Draw the cohort of round `round_` (from 1) and read its data.

        Clients that are held out or have no training examples are never drawn.

        It depends on nothing that a round changes, so rounds may be read ahead, in other threads.

        Args:
            round_: the round.
            steps: fewer than the layout's local steps leave out the others, in the same program.
        """
        layout, options = self.layout, self.participation
        trainable, sizes = self._trainable, self._sizes
        by_size = sizes if options.sampling == "size" else None
        drawn = draw_cohort(self.seed, round_, len(trainable), layout.cohort, by_size)
        numbers = trainable[drawn]
        full = np.full(len(numbers), layout.steps)
        if self.epochs is not None:
            full = np.asarray([count_steps(size, self.epochs, layout.batch) for size in sizes[drawn].tolist()])
        full = full if steps is None else np.minimum(full, steps)
        turnout = draw_turnout(self.seed, round_, numbers, full, options)
        clients, weights = make_clients(
            self.seed, round_, numbers, self.examples, self.inputs, layout, self.weighting, turnout.steps, self._own,
            self._shares[drawn],
        )  # fmt: skip
        told = {"dropped": int(turnout.dropped.sum())} if options.dropout else {}
        told |= {"stragglers": int(turnout.late.sum())} if options.stragglers else {}
        return RoundInputs(round_, numbers, clients, weights, told)

    @property
    def base(self) -> PyTree:
        """The base as the method has it now; formed once per state of the server."""
        if self._base is None or self._base[0] is not self.server:
            self._base = (self.server, self.base_at(self.server))
        return self._base[1]

    def base_at(self, server: PyTree) -> PyTree:
        """The base as the method has it with this state of the server."""
        if self.programs.base is None:
            return self.params
        return place_like(self.programs.base(self.params, server), self.params)

    def measure_round(self, read: RoundInputs) -> Footprint:
        """Compile the round that was read, without running it; returns what it needs of a device.

        Raises:
            TooLargeError: the compiler finds that it does not fit.
        """
        arguments = self._arguments(read, {"a": 0.0, "b": 0.0})
        compiled = self._compile(arguments, read.round)
        unread = count_unread(compiled, arguments)
        return measure(compiled, self.base, self.programs.mesh, self.layout.wave, unread)

    def _arguments(self, read: RoundInputs, rates: dict[str, float]) -> tuple[Any, ...]:
        """What the compiled round takes; personal states as they are now."""
        mesh, numbers, waves = self.programs.mesh, read.numbers, self.layout.waves
        held = numbers[find_fillers(self._own, len(numbers))]
        clients = read.clients._replace(new=to_waves(~self.population.known[held], waves))
        return (
            self.base,
            self.server,
            self._place_states(held),
            place_waves(mesh, clients),
            jnp.asarray(read.weights),
            {name: jnp.float32(rate) for name, rate in rates.items()},
            jnp.int32(read.round),
            self.key,
        )

    def _place_states(self, numbers: np.ndarray) -> PyTree:
        """The personal states [W, V, …] of these clients, on the devices: those of the last round where they are the
        same, which it may overwrite, and otherwise from the file."""
        left, self._left = self._left, None
        if left is not None and np.array_equal(left[0], self.population.slots[numbers]):
            return left[1]
        return place_waves(self.programs.mesh, to_waves(self.population.gather(numbers), self.layout.waves))

    def phase_of(self, round_: int) -> int:
        """Which of the method's programs runs round `round_`."""
        phase = self.programs.method.phase
        return 0 if phase is None else phase(round_)

    def round_text(self, round_: int) -> str:
        """The compiled program of round `round_`, which has run, as text."""
        return self.programs.find_compiled(self.phase_of(round_)).as_text()

    def _compile(self, arguments: tuple[Any, ...], round_: int) -> Any:
        return self.programs.compile_round(arguments, self.phase_of(round_), self.compiling)

    def _run(self, read: RoundInputs, rates: dict[str, float]) -> RoundOutput:
        with TraceAnnotation("give the program its arguments"):
            arguments = self._arguments(read, rates)
        with TraceAnnotation("start the compiled round"):
            return self._compile(arguments, read.round)(*arguments)

    def run_round(self, read: RoundInputs, rates: dict[str, float]) -> RoundReport:
        """Run a round that was read: train its cohort, aggregate, write personal states back.

        Whoever does not count leaves no trace: its state stays, and if it had none it is as new next time. Where nobody
        counts the server stays too; and everything stays where the aggregate is not finite.
        """
        numbers, before, base = read.numbers, self.server, self.base
        out = self._run(read, rates)
        health = out.health
        found = self.programs.health(before, out.personal, out.messages, out.weights) if len(read.counted) else {}
        with TraceAnnotation("wait for the round"):
            counted = np.flatnonzero(fetch(out.weights)[: len(numbers)] > 0)
        finite = bool(out.finite) and self._moves_finitely(out.server)
        if len(counted):
            health = health | (found if len(counted) > 1 else {k: v for k, v in found.items() if k not in OF_PAIRS})
        if len(counted) and finite:
            with TraceAnnotation("store personal states"):
                self._store(numbers[counted], counted, out.personal)
            self.server = out.server
        up, down = self._travelling(out.messages, max(1, len(counted)), read.round)
        return RoundReport(
            numbers=numbers,
            counted=numbers[counted],
            unfit=numbers[np.setdiff1d(read.counted, counted)],
            finite=finite,
            turnout=read.turnout,
            metrics={name: values[: len(numbers)] for name, values in fetch(out.metrics).items()},
            health={name: float(value) for name, value in health.items()},
            bytes_up=self._count_bytes(up, numbers[counted]),
            bytes_down=self._count_bytes(down, numbers),
            trained=self._trained(before, numbers, out.messages)
            if len(counted) and jax.tree.leaves(out.messages)
            else None,
            base=base,
        )

    def _moves_finitely(self, server: PyTree) -> bool:
        """Is the base still finite with what this state of the server adds to it? Finite factors may overflow."""
        return self.programs.base is None or bool(self.programs.base_is_finite(self.params, server))

    def find_unfit(self, read: RoundInputs) -> Int[np.ndarray, " some"]:
        """The clients of a round that would be unfit whatever the learning rates, for they are so at rates of 0.

        The round is run once more for it, and changes nothing.
        """
        out = self._run(read, {"a": 0.0, "b": 0.0})
        lost = np.setdiff1d(read.counted, np.flatnonzero(fetch(out.weights)[: len(read.numbers)] > 0))
        return read.numbers[lost]

    def _store(self, numbers: np.ndarray, places: np.ndarray, states: PyTree) -> None:
        """Keep the states [W, V, …] of these clients, who stand at these places of the cohort."""
        own = np.flatnonzero(np.isin(places, self._own))
        held = from_waves(fetch_own(states))
        whole = len(own) == len(self._own)  # all of them are kept, in their order, and none is copied
        if not whole:
            rows = np.searchsorted(self._own, places[own])
            held = jax.tree.map(lambda x: x[rows], held)
        self.population.scatter(numbers, held, own)
        self.population.meet()
        if whole and len(numbers) == len(self._trainable):  # everybody, who will be the next round's cohort too
            self._left = self.population.slots[numbers[own]], states

    def _travelling(self, messages: PyTree, senders: int, round_: int) -> tuple[PyTree, PyTree]:
        """What one client sends and what it receives, as trees of shapes, where so many clients sent something."""
        key = (self.phase_of(round_), senders)
        if key not in self._traffic:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((senders, *x.shape[1:]), x.dtype), messages)
            server = jax.eval_shape(lambda state: state, self.server)
            self._traffic[key] = find_travelling(self.programs.method, server, shapes)
        return self._traffic[key]

    def _count_bytes(self, part: PyTree, numbers: np.ndarray) -> int:
        """Per client, the mean over these; 0 where there are none."""
        if not len(numbers):
            return 0
        share = float(np.mean([self.ranks[number] for number in numbers])) / max(self.ranks) if self.ranks else 1.0
        return count_bytes(part, share)

    @property
    def now(self) -> Moment:
        """The federation as it stands."""
        return Moment(self.server, self.population.slots)

    def adapters(self, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """The personalised adapters of these clients [V, …], now or at another moment."""
        at = at or self.now
        return self.personalise(self.population.gather(numbers, at.slots), at.slots[numbers] != NOBODY, numbers, at)

    def global_adapters(self, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """The shared part with the private part that each of these clients started from [V, …]."""
        at = at or self.now
        return self.personalise(self.population.gather(numbers, at.slots), np.zeros(len(numbers), bool), numbers, at)

    def start_states(self, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """The states [V, …] that these clients begin with, on the host, now or at another moment."""
        return fetch(self.programs.start(self.key, (at or self.now).server, np.asarray(numbers, np.int32)))

    def personalise(self, states: PyTree, known: np.ndarray, numbers: np.ndarray, at: Moment | None = None) -> PyTree:
        """The shared part with these private states [V, …]; with the initial ones where they are not `known` [V]."""
        server = (at or self.now).server
        return self.programs.personalise(server, states, known, np.asarray(numbers, np.int32), self.key)

    def _trained(self, before: PyTree, cohort: np.ndarray, messages: PyTree) -> Callable[[np.ndarray], PyTree]:
        @cache
        def held() -> PyTree:  # on the host: taken leaf by leaf on several processes' devices they could wait for ever
            return fetch(messages)

        def adapters(numbers: np.ndarray) -> PyTree:
            at = np.searchsorted(cohort, numbers)
            own = jax.tree.map(lambda x: x[at], held())
            return self.programs.trained(before, self.population.gather(numbers), own)

        return adapters

    def state(self) -> PyTree:
        """Everything that changes, for a checkpoint: the personal states as their places and what wrote them there."""
        population = self.population
        return {"server": self.server, "slots": population.slots.copy(), "stamps": population.stamps()}

    def load(self, state: PyTree) -> None:
        """Go on from a state that `state` returned."""
        self.server = replicate(self.programs.mesh, state["server"])
        self.population.load(state["slots"], state["stamps"])
        self._left = None


def start_adapter(key: PRNGKeyArray, sites: lora.Sites, spec: lora.LoRA) -> lora.Adapter:
    """The adapter that a run starts from; it depends on the seed alone, so that methods start alike."""
    return lora.init(jax.random.fold_in(key, Stream.ADAPTER), sites, spec)
