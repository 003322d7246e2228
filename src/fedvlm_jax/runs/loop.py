"""A run from start to end: rounds, evaluation, one line per round, checkpoints, the stored adapters and results.

Everything that a later round depends on is in the checkpoint of the round before, so a run that is killed at any
moment and resumed ends with the same adapters, bit for bit, on the same machine, mesh and wave width.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax import lora, tree
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.clients import Scores
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.federation.driver import Driver, RoundReport
from fedvlm_jax.methods import Method
from fedvlm_jax.runs.config import Run, from_json, to_json
from fedvlm_jax.runs.folders import read_metrics, read_run
from fedvlm_jax.runs.prepare import Prepared, Session, make_driver, open_session, prepare
from fedvlm_jax.runs.progress import Progress, SilentProgress
from fedvlm_jax.runs.storage import describe_environment, save_adapters, write_json
from fedvlm_jax.runs.validation import validate
from fedvlm_jax.sharding import CLIENTS

__all__ = ["extend", "resume", "train"]

FINETUNING = "local"
"""The method of the local steps after a federation."""


def train(run: Run, show: Progress | None = None, session: Session | None = None) -> Path:
    """Run a federation from the start; returns the folder that holds everything about it.

    Args:
        run: the options; `out` must be given.
        show: where to report.
        session: what an earlier run of the same model and data left, to start faster.

    Raises:
        UserError: the options, the data or the model cannot work, the folder is in use, or the loss is not finite.
    """
    validate(run)
    if run.out is None:
        raise UserError("a run needs a folder: set out")
    if run.out.exists() and any(run.out.iterdir()):
        raise UserError(
            f"{run.out} is not empty: choose another --out, or go on with it: fedvlm train --resume {run.out}"
        )
    return _execute(run, show or SilentProgress(), session)


def resume(folder: Path, show: Progress | None = None, session: Session | None = None) -> Path:
    """Go on with a run from its newest checkpoint, or from the start where there is none yet.

    Raises:
        UserError: the folder is no run's, its checkpoint does not fit, or the devices of then are not there.
    """
    show = show or SilentProgress()
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = dataclasses.replace(from_json(stored["run"]), out=folder, resume=None)
    if (folder / "results.json").exists():
        show.note(f"{folder} is finished")
        return folder
    resolved = stored["resolved"]
    if resolved["mesh_clients"] > len(jax.devices()):
        raise UserError(
            f"{folder} ran on {resolved['mesh_clients']} devices and there are {len(jax.devices())} now. Numbers on "
            "another mesh agree to rounding only, so the run is not continued; start a new one."
        )
    system = dataclasses.replace(run.system, mesh_clients=resolved["mesh_clients"], wave=resolved["wave"])
    return _execute(dataclasses.replace(run, system=system), show, session)


def extend(folder: Path, run: Run, show: Progress | None = None, session: Session | None = None) -> Path:
    """Run `run`, whose rounds are those of the finished run in `folder` with local fine-tuning after them.

    Nothing is trained twice: what the finished run left is copied, and the copy goes on. It ends as `train(run)` would,
    bit for bit.

    Raises:
        UserError: the folder's run is not finished or differs in more than `finetune_steps`, or `run.out` is in use.
    """
    validate(run)
    if run.out is None:
        raise UserError("a run needs a folder: set out")
    record = read_run(folder)
    done = from_json(record.options)
    if dataclasses.replace(run, out=done.out, train=dataclasses.replace(run.train, finetune_steps=0)) != done:
        raise UserError(f"{folder} differs from {run.out} in more than local fine-tuning: it cannot go on as that run")
    if run.out.exists():
        raise UserError(f"{run.out} is there already: choose another folder")
    scratch = run.out.with_name(run.out.name + ".partial")  # a kill leaves the run whole or not begun
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shutil.copy(folder / "metrics.jsonl", scratch)
    if (folder / "checkpoints").is_dir():  # without them the copy starts anew
        shutil.copytree(folder / "checkpoints", scratch / "checkpoints")
    write_json(scratch / "config.json", {**record.config, "run": to_json(run)})
    scratch.replace(run.out)
    return resume(run.out, show, session)


def _execute(run: Run, show: Progress, session: Session | None) -> Path:
    assert run.out is not None
    session = session or open_session(run, show.note)
    prepared = prepare(run, session, show.note)
    run.out.mkdir(parents=True, exist_ok=True)
    _write_config(run, prepared)
    zero_shot = session.remember(
        ("zero-shot", run.data, run.seed, run.evaluation, prepared.objective.pairs),
        lambda: _evaluate(prepared, None, run.evaluation.splits, show),
    )
    course = _Course(prepared, run.out, show)
    try:
        course.go()
    finally:
        course.checkpoints.close()
    show.note("evaluating every client's own model")
    best = course.best
    adapters = best.adapters
    known = {} if best.scores is None else {"validation": best.scores}  # these very models were scored in their round
    splits = tuple(split for split in run.evaluation.splits if split not in known)
    personal = {**known, **_evaluate(prepared, adapters, splits, show)}
    names = [client.name for client in prepared.examples.clients]
    save_adapters(run.out / "adapters", names, adapters, best.shared, {"method": run.method, "round": best.round})
    results = {
        "selected_round": best.round,
        "zero_shot": zero_shot,
        "personal": personal,
        "description": prepared.federation.description,
    }
    write_json(run.out / "results.json", results)
    return run.out


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
class _Best:
    """The models of the round that did best on validation."""

    adapters: PyTree
    shared: PyTree
    round: int = 0
    score: float = -math.inf
    scores: Scores | None = None


class _Course:
    """The rounds of one run, and what they leave in its folder."""

    def __init__(self, prepared: Prepared, folder: Path, show: Progress) -> None:
        self.prepared, self.folder, self.show = prepared, folder, show
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.phases = list(_plan(prepared.run))
        phase = self.phases[0]
        self.driver = make_driver(prepared, phase.method, cohort=phase.cohort)
        method = self.driver.programs.method
        start = self.driver.all_adapters(prepared.layout.wave)
        self.best = _Best(start, jax.device_get(_shared(method, self.driver)))

    def go(self) -> None:
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
            self.best = _Best(adapters, shared, round_, -math.inf if score is None else score, scores)
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
        self.best = _Best(best["adapters"], best["shared"], about["best_round"], score, about["best_scores"])
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


def _evaluate(prepared: Prepared, adapters: PyTree | None, splits: tuple[Any, ...], show: Progress) -> dict[str, Any]:
    everyone = range(len(prepared.examples.clients))
    choose = None if adapters is None else lambda at: jax.tree.map(lambda leaf: leaf[at], adapters)
    if adapters is None:
        show.note("asking the bare base (zero-shot)")
    return {split: prepared.evaluator(prepared.session.params, choose, split, everyone) for split in splits}


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


def _write_config(run: Run, prepared: Prepared) -> None:
    assert run.out is not None
    if (run.out / "config.json").exists():
        return  # a resumed run keeps the record of its start
    layout = prepared.layout
    resolved = {
        "wave": layout.wave,
        "waves": layout.waves,
        "cohort": layout.cohort,
        "rows": layout.rows,
        "mesh_clients": prepared.session.mesh.shape[CLIENTS],
        "clients": [client.name for client in prepared.examples.clients],
        "train_examples": [len(client.train) for client in prepared.examples.clients],
        "adapter_parameters": sum(
            leaf.size for path, leaf in tree.flatten(prepared.adapter).items() if not path.endswith("scale")
        ),
        "adapted_sites": [path for path, _ in lora.sites_of(prepared.adapter)],
        "skipped": [dataclasses.asdict(row) for row in prepared.examples.skipped],
    }
    write_json(run.out / "config.json", {"run": to_json(run), **describe_environment(), "resolved": resolved})
