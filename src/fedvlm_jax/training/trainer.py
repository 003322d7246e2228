"""The rounds of one run: the federation, then local fine-tuning where it is asked for, watched by callbacks.

A callback adds to a round's line, writes it, keeps checkpoints, finds the best round, shows progress or profiles. The
trainer runs rounds and calls them in their order; it writes nothing itself.
"""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.data.batches import pad_rows, read_ahead
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import fetch
from fedvlm_jax.evaluation.evaluator import Adapters
from fedvlm_jax.federation.simulator import RoundInputs, RoundReport, Simulator
from fedvlm_jax.training.experiment import FINETUNING, Experiment, make_finetuner, make_simulator
from fedvlm_jax.training.personalization import each_model, give_models
from fedvlm_jax.utils.progress import COMPILING, Progress, working


@dataclass(frozen=True)
class RoundResult:
    """A finished round: what it read and left on the host, and the seconds that it took, without compiling.

    Callbacks add to `line`, its line of `metrics.jsonl`, before it is written.
    """

    inputs: RoundInputs
    report: RoundReport
    line: dict[str, Any]
    seconds: float

    @property
    def round(self) -> int:
        """Return the round's number."""
        return self.inputs.round


class Callback:
    """Base of what happens around rounds; a callback overrides what it needs.

    >>> class PrintLoss(Callback):
    ...     def on_round(self, trainer, result):
    ...         print(result.round, result.line["loss"])
    """

    def on_start(self, trainer: "FederatedTrainer", done: int) -> None:
        """Begin, when rounds up to `done` are finished."""

    def around_round(self, trainer: "FederatedTrainer", round_: int) -> AbstractContextManager[None]:
        """Return what is entered around a round; it is no part of the round's time."""
        del trainer, round_
        return nullcontext()

    def on_round(self, trainer: "FederatedTrainer", result: RoundResult) -> None:
        """Take note of a finished round."""

    def on_end(self, trainer: "FederatedTrainer") -> None:
        """End, after the last round."""

    def on_finished(self, folder: Path, show: Progress) -> None:
        """Take note that the run's folder holds all there will be, its results too; it may have for long."""

    def close(self) -> None:
        """Let go, however the run ended."""


@dataclass(frozen=True)
class _Phase:
    """Rounds of one method: the federation, or the local fine-tuning after it.

    >>> _Phase("local", first=5, last=6, steps=4, total_steps=6).steps_of(6)
    2
    """

    method: str
    first: int
    last: int
    steps: int
    total_steps: int

    def steps_of(self, round_: int) -> int:
        # The last round of fine-tuning may be shorter.
        return min(self.steps, self.total_steps - (round_ - self.first) * self.steps)


class FederatedTrainer:
    """Run the rounds of one run.

    Attributes:
        experiment: the run.
        simulators: of the phases that have begun: the federation, and the fine-tuning after it.
        last_server: the server's state of the federation, where a method moves the base that is fine-tuned on.
    """

    def __init__(self, experiment: Experiment) -> None:
        """Stand before the first round."""
        self.experiment = experiment
        run, steps = experiment.run, experiment.layout.steps
        rounds, more_steps = run.train.rounds, run.train.finetune_steps
        self.phases = [_Phase(run.method, 1, rounds, steps, rounds * steps)]
        if more_steps:
            last = rounds + math.ceil(more_steps / steps)
            self.phases.append(_Phase(FINETUNING, rounds + 1, last, steps, more_steps))
        self.has_run, self.compile_seconds = False, 0.0
        self.simulators: list[Simulator] = []
        self.last_server: PyTree = {}
        self._add(make_simulator(experiment, experiment.folder / "states-0.bin"))

    @property
    def simulator(self) -> Simulator:
        """Return the simulator of the phase that the run is in."""
        return self.simulators[-1]

    @property
    def phase(self) -> int:
        """Return the number of the phase that the run is in: 0 in the federation, 1 in the fine-tuning after it."""
        return len(self.simulators) - 1

    @property
    def last_round(self) -> int:
        """Return the number of the last round."""
        return self.phases[-1].last

    def phase_of(self, round_: int) -> int:
        """Return the number of the phase of a round."""
        return max(number for number, phase in enumerate(self.phases) if phase.first <= round_)

    def ends_phase(self, round_: int) -> bool:
        """Say whether a round is the last of the run or of the federation."""
        return round_ in (self.last_round, self.phases[0].last)

    def is_validated(self, round_: int) -> bool:
        """Say whether models are validated after a round."""
        return self.ends_phase(round_) or round_ % self.experiment.run.evaluation.every == 0

    def run(self, done: int, callbacks: Sequence[Callback]) -> None:
        """Run all rounds after round `done`, which the simulators stand at; callbacks are called in their order.

        Raises:
            ValueError: the trainer has run before.
        """
        if self.has_run:
            raise ValueError("a trainer runs once: its simulators stand after the last round, so make another one")
        self.has_run = True
        for callback in callbacks:
            callback.on_start(self, done)
        for number, phase in enumerate(self.phases):
            if number and done < phase.first:
                self._finetune()
            first = max(phase.first, done + 1)
            # The next round is read while this one runs.
            rounds = read_ahead(partial(_read_round, self.simulator, phase), first, phase.last + 1)
            for _ in range(first, phase.last + 1):
                self._run_round(phase, rounds, callbacks)
        for callback in callbacks:
            callback.on_end(self)

    def start_finetuning(self, models: Adapters, params: PyTree) -> None:
        """Append the simulator of local fine-tuning: of adapters in the form of these models, on a base."""
        adapter = jax.tree.map(lambda leaf: leaf[0], models(np.zeros(self.experiment.layout.wave, np.int64)))
        self._add(make_finetuner(self.experiment, adapter, params, self.experiment.folder / "states-1.bin"))

    def _add(self, simulator: Simulator) -> None:
        simulator.compiling = self._time_compiling  # a new shape compiles within a round
        self.simulators.append(simulator)

    @contextmanager
    def _time_compiling(self) -> Generator[None]:
        """Show that a round is compiled, which is no part of its time."""
        start = time.perf_counter()
        try:
            with working(self.experiment.show, COMPILING):
                yield
        finally:
            self.compile_seconds += time.perf_counter() - start

    def _finetune(self) -> None:
        """Begin local fine-tuning: every client's model so far becomes its private adapter."""
        before, wave = self.simulator, self.experiment.layout.wave
        models = give_models(self.experiment, before, before.now)
        if before.programs.base is not None:
            self.last_server = jax.device_get(before.server)
        self.start_finetuning(models, before.base)
        simulator, method = self.simulator, self.simulator.programs.method

        def start_with(adapter: PyTree, number: Any) -> PyTree:
            return method.init_client(key=simulator.key, server=method.init(adapter=adapter), number=number)

        start = jax.jit(jax.vmap(start_with))  # with fresh optimisers
        for numbers, adapters in each_model(models, len(simulator.client_states), wave):
            states, share = fetch(start(adapters, pad_rows(numbers, wave))), processes.share_out(len(numbers))
            simulator.client_states.scatter(numbers, jax.tree.map(lambda leaf, at=share: leaf[at], states), share)
        simulator.client_states.meet()

    def _run_round(self, phase: _Phase, rounds: Iterator[RoundInputs], callbacks: Sequence[Callback]) -> None:
        start = time.perf_counter()  # waiting for data is part of a round's time
        inputs = next(rounds)
        waited, compiled = time.perf_counter() - start, self.compile_seconds
        with ExitStack() as around:
            for callback in callbacks:
                around.enter_context(callback.around_round(self, inputs.round))
            start = time.perf_counter()
            report = self.simulator.run_round(inputs, find_rates(self.experiment.run.train, inputs.round))
            seconds = waited + time.perf_counter() - start - (self.compile_seconds - compiled)
        hostile = self.experiment.attackers if phase.first == 1 else ()
        line = describe_round(inputs.round, phase.method, report, seconds, hostile)
        result = RoundResult(inputs, report, line, seconds)
        for callback in callbacks:
            callback.on_round(self, result)


def _read_round(simulator: Simulator, phase: _Phase, round_: int) -> RoundInputs:
    return simulator.read_round(round_, phase.steps_of(round_))


def describe_round(
    round_: int, method: str, report: RoundReport, seconds: float, hostile: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the line of a round: means over clients whose training counted; no such numbers where nobody's did.

    Clients that are `hostile` are in no mean, unless nobody else trained.
    """
    trained = (report.metrics["steps"] > 0) & ~np.isin(report.numbers, report.unfit)
    honest = trained & ~np.isin(report.numbers, np.asarray(hostile, np.int64))
    trained = honest if honest.any() else trained
    mean = {name: float(values[trained].mean()) for name, values in report.metrics.items()} if trained.any() else {}
    return {
        "round": round_,
        "method": method,
        "clients": len(report.numbers),
        **report.turnout,
        **mean,
        **report.health,
        "bytes_up_per_client": report.bytes_up,
        "bytes_down_per_client": report.bytes_down,
        "seconds": seconds,
        "clients_per_second": len(report.numbers) / seconds,
        "validation": None,
    }
