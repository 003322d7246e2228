"""The rounds of one run: its phases, what a round leaves in the folder, and the models of the best round so far.

Everything that a later round depends on is in the checkpoint of the round before.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.clients import Scores
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.federation.driver import Driver, RoundReport
from fedvlm_jax.methods import Method
from fedvlm_jax.runs.config import Run
from fedvlm_jax.runs.folders import read_metrics
from fedvlm_jax.runs.prepare import Prepared, make_driver
from fedvlm_jax.runs.progress import Progress

__all__ = ["Best", "Course"]

FINETUNING = "local"
"""The method of the local steps after a federation."""


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
    """The models of the round that did best on validation."""

    adapters: PyTree
    shared: PyTree
    round: int = 0
    score: float = -math.inf
    scores: Scores | None = None


class Course:
    """The rounds of one run, and what they leave in its folder."""

    def __init__(self, prepared: Prepared, folder: Path, show: Progress) -> None:
        self.prepared, self.folder, self.show = prepared, folder, show
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.phases = list(_plan(prepared.run))
        phase = self.phases[0]
        self.driver = make_driver(prepared, phase.method, cohort=phase.cohort)
        method = self.driver.programs.method
        start = self.driver.all_adapters(prepared.layout.wave)
        self.best = Best(start, jax.device_get(_shared(method, self.driver)))

    def go(self) -> None:
        """Run all rounds that are not in a checkpoint."""
        run, done = self.prepared.run, self._load()
        self._trim_metrics(done)
        self.show.start(self.phases[-1].last, f"{run.method} · seed {run.seed}", done)
        for number, phase in enumerate(self.phases):
            if number and done < phase.first:
                self._enter(phase)
            for round_ in range(max(phase.first, done + 1), phase.last + 1):
                self._round(phase, round_)
        self.show.finish()

    def _enter(self, phase: _Phase) -> None:
        """Start a phase of local fine-tuning: every client's own model so far becomes its private adapter."""
        adapters = self.driver.all_adapters(self.prepared.layout.wave)
        self.driver = make_driver(self.prepared, phase.method, cohort=phase.cohort, common_start=True)
        _adopt(self.driver, adapters)

    def _round(self, phase: _Phase, round_: int) -> None:
        start = time.perf_counter()
        report = self.driver.run_round(round_, self._rates(round_), phase.steps_of(round_))
        seconds = time.perf_counter() - start
        line = _describe_round(round_, phase.method, report, seconds)
        if not math.isfinite(line["loss"]):
            newest = self.checkpoints.newest()
            raise UserError(
                f"round {round_}: the training loss is not finite. Lower --train.learning-rate-a and "
                f"--train.learning-rate-b; the last good checkpoint is that of round {newest or 0} in {self.folder}"
            )
        last = round_ in (self.phases[-1].last, self.phases[0].last)
        if last or round_ % self.prepared.run.evaluation.every == 0:
            line["validation"] = self._validate(round_, report)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if last or round_ % self.prepared.run.checkpoint_every == 0:
            self._save(round_)
        self.show.round(line)

    def _validate(self, round_: int, report: RoundReport) -> dict[str, Any]:
        evaluator, params = self.prepared.evaluator, self.prepared.session.params
        everyone = range(len(self.prepared.examples.clients))
        scores = evaluator(params, self.driver.adapters, "validation", everyone)
        result: dict[str, Any] = {name: _mean(values) for name, values in scores.items()}
        if report.trained is not None and self.prepared.run.evaluation.before_redistribution:
            before = evaluator(params, report.trained, "validation", report.numbers.tolist())
            names = before["exact_match"].keys()
            result["before_redistribution"] = {"exact_match": _mean(before["exact_match"])}
            result["after_redistribution"] = {"exact_match": _mean({n: scores["exact_match"][n] for n in names})}
        score = result["exact_match"]
        if score is None or score > self.best.score:  # without validation data the newest is the best there is
            adapters = self.driver.all_adapters(self.prepared.layout.wave)
            shared = jax.device_get(_shared(self.driver.programs.method, self.driver))
            shared = shared if jax.tree.leaves(shared) else self.best.shared
            self.best = Best(adapters, shared, round_, -math.inf if score is None else score, scores)
        return result

    def _rates(self, round_: int) -> dict[str, float]:
        train = self.prepared.run.train
        factor = train.decay if round_ > train.decay_at * train.rounds else 1.0
        return {"a": train.learning_rate_a * factor, "b": train.learning_rate_b * factor}

    def _state(self) -> PyTree:
        return {"driver": self.driver.state(), "best": {"adapters": self.best.adapters, "shared": self.best.shared}}

    def _save(self, round_: int) -> None:
        best = self.best
        score = best.score if best.round else None
        about = {"best_round": best.round, "best_score": score, "best_scores": best.scores}
        self.checkpoints.save(round_, self._state(), about)

    def _load(self) -> int:
        """Go to the newest checkpoint; returns its round, 0 where there is none."""
        done = self.checkpoints.newest()
        if done is None:
            return 0
        phase = next(phase for phase in reversed(self.phases) if phase.first <= done)
        if phase is not self.phases[0]:
            self.driver = make_driver(self.prepared, phase.method, cohort=phase.cohort, common_start=True)
        state, about = self.checkpoints.restore(done, self._state())
        self.driver.load(state["driver"])
        score = about["best_score"]
        best = state["best"]
        score = -math.inf if score is None else score
        self.best = Best(best["adapters"], best["shared"], about["best_round"], score, about["best_scores"])
        return done

    def _trim_metrics(self, done: int) -> None:
        """Forget lines of rounds that are not in a checkpoint: they are run again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [json.dumps(line) + "\n" for line in read_metrics(self.folder) if line["round"] <= done]
            scratch = path.with_suffix(".tmp")
            scratch.write_text("".join(lines), encoding="utf-8")
            scratch.replace(path)


def _plan(run: Run) -> Iterator[_Phase]:
    train = run.train
    yield _Phase(run.method, run.cohort, 1, train.rounds, train.local_steps)
    if train.finetune_steps:
        rounds = -(-train.finetune_steps // train.local_steps)
        yield _Phase(FINETUNING, None, train.rounds + 1, train.rounds + rounds, train.local_steps, train.finetune_steps)


def _adopt(driver: Driver, adapters: PyTree) -> None:
    """Make these adapters [C, …] the clients' private ones, with fresh optimisers."""
    method, clients = driver.programs.method, len(driver.population)
    everyone = np.arange(clients)
    fresh = jax.vmap(lambda adapter: method.init_client(driver.key, method.init(adapter)))(adapters)
    driver.population.scatter(everyone, jax.device_get(fresh))


def _shared(method: Method, driver: Driver) -> PyTree:
    return method.download(driver.server)


def _describe_round(round_: int, method: str, report: RoundReport, seconds: float) -> dict[str, Any]:
    counts = report.metrics["steps"] > 0
    mean = {name: float(values[counts].mean()) if counts.any() else 0.0 for name, values in report.metrics.items()}
    return {
        "round": round_,
        "method": method,
        "clients": len(report.numbers),
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
