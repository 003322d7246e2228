"""The rounds of one run: its phases, what a round leaves in the folder, and the models of the best round so far.

Everything that a later round depends on is in the checkpoint of the round before. Of several processes the first writes
the lines and the checkpoints, and all of them know what is in them.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.data.batches import pad_rows
from fedvlm_jax.data.prefetch import read_ahead
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import fetch, replicate
from fedvlm_jax.errors import DamagedError, UserError, naming
from fedvlm_jax.evaluation.evaluator import Adapters, Scores
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.federation.client_states import Slots
from fedvlm_jax.federation.simulator import Driver, Moment, RoundInputs, RoundReport
from fedvlm_jax.training.config import Run
from fedvlm_jax.training.failures import UNFIT, describe_rounds, describe_unfit, explain_aggregate, explain_all_unfit
from fedvlm_jax.training.personalization import each_model, give_models
from fedvlm_jax.training.prepare import Prepared, make_driver
from fedvlm_jax.training.progress import COMPILING, Progress, working
from fedvlm_jax.training.run_dir.reader import read_metrics
from fedvlm_jax.utils.files import write_text

__all__ = ["Best", "Course", "Watch", "leave_alone"]

KEPT = 2
"""Checkpoints, the newest."""

FINETUNING = "local"
"""The method of the local steps after a federation."""


Watch = Callable[[Driver, int], AbstractContextManager[None]]
"""What is done around a round, and is no part of its time."""


def leave_alone(driver: Driver, round_: int) -> AbstractContextManager[None]:
    """Nothing is done around rounds."""
    del driver, round_
    return nullcontext()


@dataclass(frozen=True)
class _Phase:
    """Rounds of one method: the federation, then local fine-tuning where it is asked for."""

    method: str
    cohort: int | None
    first: int
    last: int
    steps: int
    total_steps: int | None = None

    def steps_of(self, round_: int) -> int:
        if self.total_steps is None:
            return self.steps
        return min(self.steps, self.total_steps - (round_ - self.first) * self.steps)


@dataclass
class Best:
    """The round that did best on validation.

    Attributes:
        server: the server's state of the last federated round that was the best so far, on the host.
        slots: where the personal states of that round are.
        round: which round it was; 0 before any.
        phase: in which phase it was.
        score: the metric that selects, and minus the loss, which breaks ties.
    """

    server: PyTree
    slots: Slots
    round: int = 0
    phase: int = 0
    score: tuple[float, float] = (-math.inf, -math.inf)


class Course:
    """The rounds of one run, and what they leave in its folder."""

    def __init__(
        self,
        prepared: Prepared,
        folder: Path,
        show: Progress,
        ask_base: Callable[[], Any],
        watch: Watch = leave_alone,
    ) -> None:
        """Be ready to run.

        Args:
            prepared, folder, show: the run, where it writes, where it reports.
            ask_base: has the evaluator know what the bare base answers; called before models are compared with it.
            watch: is around every round.
        """
        self.prepared, self.folder, self.show, self.ask_base, self.watch = prepared, folder, show, ask_base, watch
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=KEPT)
        self.phases = list(_plan(prepared.run, prepared.layout.steps))
        self.compiled = 0.0  # seconds
        self.drivers = [self._start(0)]
        self.rounds = 0  # since this process began
        self.saved: list[int] = []  # rounds whose checkpoints are kept
        self.unfit: set[str] = set()  # clients of which it was told
        self.last_server: PyTree = {}  # of the federation, where a method moves the base that is fine-tuned on
        population = self.driver.population
        self.best = Best(jax.device_get(self.driver.server), population.keep("best"))

    @property
    def driver(self) -> Driver:
        """Of the phase that the run is in."""
        return self.drivers[-1]

    @property
    def federated(self) -> bool:
        """Is this the federation, and not yet the fine-tuning after it?"""
        return len(self.drivers) == 1

    def give_best(self) -> Adapters:
        """Every client's own model of the best round."""
        best = self.best
        if best.phase == 0:
            return give_models(self.prepared, self.drivers[0], Moment(best.server, best.slots))
        driver = self.drivers[best.phase]
        return partial(driver.adapters, at=Moment(driver.server, best.slots))

    def _start(self, number: int, go_on: tuple[PyTree, PyTree] | None = None) -> Driver:
        phase, file = self.phases[number], self.folder / f"states-{number}.bin"
        driver = make_driver(self.prepared, phase.method, cohort=phase.cohort, go_on=go_on, file=file)
        driver.compiling = self._show_compiling
        return driver

    @contextmanager
    def _show_compiling(self) -> Generator[None]:
        """Show that it compiles, which is no part of a round's time."""
        start = time.perf_counter()
        try:
            with working(self.show, COMPILING):
                yield
        finally:
            self.compiled += time.perf_counter() - start

    def go(self) -> None:
        """Run all rounds that are not in a checkpoint."""
        run, done = self.prepared.run, self._load()
        self._trim_metrics(done)
        last = self.phases[-1].last
        validated = sum(self._is_validated(round_) for round_ in range(done + 1, last + 1))
        self.show.start(last, f"{run.method} · seed {run.seed}", done, validated)
        for number, phase in enumerate(self.phases):
            if number and done < phase.first:
                self._enter(number)
            first = max(phase.first, done + 1)
            rounds = read_ahead(partial(_read_round, self.driver, phase), first, phase.last + 1)
            for _ in range(first, phase.last + 1):
                self._round(phase, rounds)
        self.show.finish()
        if not self.best.round:
            raise UserError(
                f"{self.folder}: on the clients' validation data no round's models have a finite loss, so there is "
                "none to choose; lower --train.learning-rate-a and --train.learning-rate-b"
            )
        for sentence in describe_rounds(read_metrics(self.folder)):
            self.show.note(sentence)

    def _enter(self, number: int) -> None:
        """Start a phase of local fine-tuning: every client's own model so far becomes its private adapter."""
        before, base = self.driver, self.driver.base
        models = give_models(self.prepared, before, before.now)
        if before.programs.base is not None:
            self.last_server = jax.device_get(before.server)
        self.drivers.append(self._start(number, go_on=(_first(models, self.prepared.layout.wave), base)))
        _adopt(self.driver, models, self.prepared.layout.wave)

    def _round(self, phase: _Phase, rounds: Iterator[RoundInputs]) -> None:
        start = time.perf_counter()  # waiting for data is part of a round's time
        read = next(rounds)
        round_ = read.round
        waited, compiled = time.perf_counter() - start, self.compiled
        with self.watch(self.driver, round_):
            start = time.perf_counter()
            report = self.driver.run_round(read, self._rates(round_))
            seconds = waited + time.perf_counter() - start - (self.compiled - compiled)
        line = _describe_round(round_, phase.method, report, seconds)
        told = self._judge(read, report, line)
        last = self._is_last(round_)
        if self._is_validated(round_):
            line["validation"] = self._validate(round_, report)
        self._write_line(line)
        if last or round_ % self.prepared.run.checkpoint_every == 0:
            self._save(round_)
        self.show.round(line)
        self.rounds += 1
        if self.rounds == 2:
            self.show.note(f"a round after the first takes {seconds:.2g} s, evaluation apart")
        if told:
            self.show.note(told)

    def _judge(self, read: RoundInputs, report: RoundReport, line: dict[str, Any]) -> str:
        """Name in the line the clients whose numbers are not finite; returns what there is to say of those not yet met.

        Raises:
            UserError: there are no others in the round, or what became of them is not finite.
        """
        if not report.finite:
            raise UserError(explain_aggregate(read.round, self._tell_good()))
        if not len(report.unfit):
            return ""
        clients = self.prepared.examples.clients
        names = [clients[number].name for number in report.unfit]
        line[UNFIT] = names
        if len(report.counted) and self.unfit.issuperset(names):
            return ""  # it was told, and the question costs a round
        self.unfit.update(names)
        from_the_start = {clients[number].name for number in self.driver.find_unfit(read)}
        if not len(report.counted):
            model, good = self.prepared.run.model, self._tell_good()
            raise UserError(explain_all_unfit(read.round, names, from_the_start, model, good))
        return describe_unfit(read.round, names, from_the_start)

    def _tell_good(self) -> str:
        """Say which checkpoint a run that ends leaves; every one is of a round whose numbers were finite."""
        newest = self.checkpoints.newest()
        left = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is that of round {newest}"
        return f"{left} in {self.folder}"

    def _is_last(self, round_: int) -> bool:
        """Is it the last round of the run, or of the federation?"""
        return round_ in (self.phases[-1].last, self.phases[0].last)

    def _is_validated(self, round_: int) -> bool:
        return self._is_last(round_) or round_ % self.prepared.run.evaluation.every == 0

    def _write_line(self, line: dict[str, Any]) -> None:
        if processes.is_first():
            path = self.folder / "metrics.jsonl"
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _validate(self, round_: int, report: RoundReport) -> dict[str, Any]:
        self.ask_base()
        with working(self.show, "validating every client's model"):
            return self._score_round(round_, report)

    def _score_round(self, round_: int, report: RoundReport) -> dict[str, Any]:
        chosen = self.prepared.select_by
        models = self.driver.adapters
        if self.federated:  # with a cold start for who was not drawn yet, as at the end
            models = give_models(self.prepared, self.driver, self.driver.now)
        scores = self._score(self.driver.base, models, self.prepared.scored)
        result: dict[str, Any] = {"metric": chosen, **{name: _mean(values) for name, values in scores.items()}}
        if report.trained is not None and self.prepared.run.evaluation.before_redistribution:
            asked = [number for number in report.counted.tolist() if number in self.prepared.scored]
            before = self._score(report.base, report.trained, asked).get(chosen, {})
            result["before_redistribution"] = {chosen: _mean(before)}
            result["after_redistribution"] = {chosen: _mean({name: scores[chosen][name] for name in before})}
        value, loss = result.get(chosen), result.get("loss")
        # Without validation data the newest is the best there is. A model whose loss is not finite is never the best.
        score = (-math.inf, -math.inf) if value is None or loss is None else (value, -loss)
        if value is None or (all(map(math.isfinite, score)) and score > self.best.score):
            server = jax.device_get(self.driver.server) if self.federated else self.last_server or self.best.server
            self.best = Best(server, self.driver.population.keep("best"), round_, len(self.drivers) - 1, score)
        return result

    def _score(self, base: PyTree, adapters: Adapters, numbers: Sequence[int]) -> Scores:
        """Validation scores; rejected answers, a fifth of the work, only where they decide: the end scores them too."""
        evaluator = self.prepared.evaluator
        rejected = self.prepared.select_by not in evaluator.metrics
        return evaluator(base, {"own": adapters}, "validation", numbers, rejected=rejected)["own"].scores

    def _rates(self, round_: int) -> dict[str, float]:
        train = self.prepared.run.train
        factor = train.decay if round_ > train.decay_at * train.rounds else 1.0
        factor *= min(1.0, round_ / (train.warmup_rounds + 1))
        return {"a": train.learning_rate_a * factor, "b": train.learning_rate_b * factor}

    def _state(self) -> PyTree:
        population = self.drivers[self.best.phase].population
        best = {"server": self.best.server, "slots": self.best.slots, "stamps": population.stamps(self.best.slots)}
        return {"driver": self.driver.state(), "best": best, "last_server": self.last_server}

    def _save(self, round_: int) -> None:
        best, population = self.best, self.driver.population
        score = [value if math.isfinite(value) else None for value in best.score]
        about = {"best_round": best.round, "best_phase": best.phase, "best_score": score}
        population.flush()  # before the table that names them
        self._protect(round_, population.slots, best.slots)
        self.checkpoints.save(round_, self._state(), about, {"states": population.shapes})
        self.saved.append(round_)
        for old in self.saved[:-KEPT]:
            population.let_go(old)
            population.let_go(("best", old))
        self.saved = self.saved[-KEPT:]

    def _protect(self, round_: int, slots: Slots, best: Slots) -> None:
        """Have no record overwritten that the checkpoint of a round names: a kill or damage may need it again."""
        population = self.driver.population
        population.keep(round_, slots.copy())
        if self.best.phase == len(self.drivers) - 1:  # an earlier phase's records are not written any more
            population.keep(("best", round_), best.copy())

    def _load(self) -> int:
        """Go to the newest checkpoint that is whole; returns its round, 0 where there is none yet.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        rounds: list[int] = processes.tell_all(self.checkpoints.rounds)
        faults: list[str] = []
        for done in rounds:
            try:
                self._go_to(done)
            except DamagedError as error:
                faults.append(str(error))
                del self.drivers[1:]
                continue
            for damaged, fault in zip(rounds, faults, strict=False):
                self.show.note(f"{fault}; the run goes on from round {done}, and round {damaged} is run again")
                self.checkpoints.forget(damaged)
            self._keep_older([older for older in rounds if older < done])
            return done
        if faults:
            raise UserError(
                f"{self.folder} cannot be resumed, because none of its checkpoints is whole: {'; '.join(faults)}. Put "
                "the folder back from a copy, or start a new run"
            )
        return 0

    def _go_to(self, done: int) -> None:
        """Be as after round `done`.

        Raises:
            DamagedError: its checkpoint, or a personal state that it names, is not as it was written.
        """
        number = self._phase_of(done)
        federation = self.driver
        if number:
            self.last_server = jax.device_get(federation.server) if federation.programs.base is not None else {}
            start = (_first(federation.adapters, self.prepared.layout.wave), self.prepared.session.params)
            self.drivers.append(self._start(number, go_on=start))
        state, about = self.checkpoints.restore(done, self._state(), {"states": self.driver.population.shapes})
        self.last_server = state["last_server"]
        if self.last_server:
            federation.server = replicate(self.prepared.session.mesh, self.last_server)
            self.driver.params = federation.base
        self.driver.load(state["driver"])
        metric, loss = (-math.inf if value is None else value for value in about["best_score"])
        best, own, remembering = state["best"], self.driver.population, self.drivers[about["best_phase"]].population
        self.best = Best(best["server"], best["slots"], about["best_round"], about["best_phase"], (metric, loss))
        remembering.recall(best["slots"], best["stamps"])
        remembering.keep("best", best["slots"])
        if fault := processes.tell_all(lambda: own.find_damage(own.slots) or remembering.find_damage(best["slots"])):
            raise DamagedError(fault)
        self._protect(done, own.slots, self.best.slots)
        self.saved = [done]

    def _keep_older(self, rounds: Sequence[int]) -> None:
        """Keep what older checkpoints of this phase name, should the newest turn out to be damaged another time."""
        population = self.driver.population
        for round_ in sorted(rounds):
            if self._phase_of(round_) == len(self.drivers) - 1:
                with contextlib.suppress(DamagedError):
                    state, _ = self.checkpoints.restore(round_, self._state(), {"states": population.shapes})
                    for part in (state["driver"], state["best"]):
                        population.recall(part["slots"], part["stamps"])
                    self._protect(round_, state["driver"]["slots"], state["best"]["slots"])
                    self.saved.insert(-1, round_)

    def _phase_of(self, round_: int) -> int:
        return max(number for number, phase in enumerate(self.phases) if phase.first <= round_)

    def _trim_metrics(self, done: int) -> None:
        """Forget lines of rounds that are not in a checkpoint: they are run again."""
        path = self.folder / "metrics.jsonl"
        if processes.is_first() and (done or path.exists()):
            kept = [line for line in read_metrics(self.folder) if line["round"] <= done]
            if lost := done - len(kept):
                self.show.note(f"{path} lacks {lost} of {done} rounds: reports leave them out, and nothing else does")
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _plan(run: Run, steps: int) -> Iterator[_Phase]:
    """The phases, in rounds of at most `steps` local steps."""
    train = run.train
    yield _Phase(run.method, run.cohort, 1, train.rounds, steps)
    if train.finetune_steps:
        rounds = -(-train.finetune_steps // steps)
        yield _Phase(FINETUNING, None, train.rounds + 1, train.rounds + rounds, steps, train.finetune_steps)


def _read_round(driver: Driver, phase: _Phase, round_: int) -> RoundInputs:
    return driver.read_round(round_, phase.steps_of(round_))


def _first(models: Adapters, wave: int) -> PyTree:
    """An adapter of the form that all of them have."""
    return jax.tree.map(lambda leaf: leaf[0], models(np.zeros(wave, np.int64)))


def _adopt(driver: Driver, models: Adapters, wave: int) -> None:
    """Make these models the clients' private ones, with fresh optimisers."""
    method = driver.programs.method

    def start_with(adapter: PyTree, number: Any) -> PyTree:
        return method.init_client(key=driver.key, server=method.init(adapter=adapter), number=number)

    start = jax.jit(jax.vmap(start_with))
    for numbers, adapters in each_model(models, len(driver.population), wave):
        states, own = fetch(start(adapters, pad_rows(numbers, wave))), processes.share_out(len(numbers))
        driver.population.scatter(numbers, jax.tree.map(lambda leaf, own=own: leaf[own], states), own)
    driver.population.meet()


def _describe_round(round_: int, method: str, report: RoundReport, seconds: float) -> dict[str, Any]:
    """The line of a round: means over the clients whose training counted, and no such numbers where nobody's did."""
    trained = (report.metrics["steps"] > 0) & ~np.isin(report.numbers, report.unfit)
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


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
