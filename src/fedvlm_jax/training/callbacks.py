"""Callbacks of every run: judge a round's clients, validate and keep the best, write the round's line, show it."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree

from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError, naming
from fedvlm_jax.evaluation.evaluator import Adapters, Scores
from fedvlm_jax.federation.client_states import Slots
from fedvlm_jax.federation.simulator import Moment, RoundReport
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training.experiment import Experiment
from fedvlm_jax.training.failures import UNFIT, describe_rounds, describe_unfit, explain_aggregate, explain_all_unfit
from fedvlm_jax.training.final_evaluation import ask_base
from fedvlm_jax.training.personalization import give_models
from fedvlm_jax.training.progress import working
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult
from fedvlm_jax.utils.files import write_text


class FiniteCheck(Callback):
    """Name clients whose numbers are not finite; end the run where nobody else is left."""

    def __init__(self, describe_left: Callable[[], str]) -> None:
        """Take what says which checkpoint a run that ends here leaves."""
        self.describe_left = describe_left
        self.known: set[str] = set()  # clients that were reported

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Name them in the line.

        Raises:
            UserError: all clients of the round are unfit, or what became of the others is not finite.
        """
        report, clients = result.report, trainer.experiment.examples.clients
        if not report.finite:
            raise UserError(explain_aggregate(result.round, self.describe_left()))
        if not len(report.unfit):
            return
        names = [clients[number].name for number in report.unfit]
        result.line[UNFIT] = names
        if len(report.counted) and self.known.issuperset(names):
            return  # to ask again whether they are unfit at rates of 0 would cost a round
        self.known.update(names)
        from_the_start = {clients[number].name for number in trainer.simulator.find_unfit(result.inputs)}
        if not len(report.counted):
            model, left = trainer.experiment.run.model, self.describe_left()
            raise UserError(explain_all_unfit(result.round, names, from_the_start, model, left))
        trainer.experiment.show.note(describe_unfit(result.round, names, from_the_start))


@dataclass
class Best:
    """The round that did best on validation, of which phase; round 0 before any.

    Attributes:
        server: the server's state of the last federated round that was the best so far, on the host.
        slots: where the personal states of that round are.
        score: the metric that selects, and minus the loss, which breaks ties.
    """

    server: PyTree
    slots: Slots
    round: int = 0
    phase: int = 0
    score: tuple[float, float] = (-math.inf, -math.inf)


class BestRound(Callback):
    """Validate every client's model every few rounds and keep the round that did best."""

    def __init__(self, trainer: FederatedTrainer) -> None:
        """Take the start as the best there is so far."""
        self.trainer, start = trainer, trainer.simulator
        self.best = Best(jax.device_get(start.server), start.client_states.keep("best"))

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Add `validation` to the line of a round that is validated."""
        if trainer.is_validated(result.round):
            ask_base(trainer.experiment)  # rewards are relative to what it answers
            with working(trainer.experiment.show, "validating every client's model"):
                result.line["validation"] = self._validate(result.round, result.report)

    def on_end(self, trainer: FederatedTrainer) -> None:
        """Check that there is a best round.

        Raises:
            UserError: no round's models have a finite loss.
        """
        if not self.best.round:
            raise UserError(
                f"{trainer.experiment.folder}: on the clients' validation data no round's models have a finite loss, "
                "so there is none to choose; lower --train.learning-rate-a and --train.learning-rate-b"
            )

    def give_models(self) -> Adapters:
        """Return every client's model of the best round."""
        best, simulator = self.best, self.trainer.simulators[self.best.phase]
        if best.phase:  # fine-tuning changes no server's state, and every client has taken part in it
            return partial(simulator.adapters, at=Moment(simulator.server, best.slots))
        return give_models(self.trainer.experiment, simulator, Moment(best.server, best.slots))

    def _validate(self, round_: int, report: RoundReport) -> dict[str, Any]:
        trainer, experiment, simulator = self.trainer, self.trainer.experiment, self.trainer.simulator
        chosen = experiment.select_by
        models = simulator.adapters
        if trainer.phase == 0:  # with a cold start for who was not drawn yet, as at the end
            models = give_models(experiment, simulator, simulator.now)
        scores = score_validation(experiment, simulator.base, models, experiment.scored)
        result: dict[str, Any] = {"metric": chosen, **{name: _mean(values) for name, values in scores.items()}}
        if report.trained is not None and experiment.run.evaluation.before_redistribution:
            # Who dropped out has nothing to compare.
            asked = [number for number in report.counted.tolist() if number in experiment.scored]
            before = score_validation(experiment, report.base, report.trained, asked).get(chosen, {})
            result["before_redistribution"] = {chosen: _mean(before)}
            result["after_redistribution"] = {chosen: _mean({name: scores[chosen][name] for name in before})}
        value, loss = result.get(chosen), result.get("loss")
        # Without validation data the newest is the best there is. A model whose loss is not finite is never the best.
        score = (-math.inf, -math.inf) if value is None or loss is None else (value, -loss)
        if value is None or (all(map(math.isfinite, score)) and score > self.best.score):
            server = trainer.last_server or self.best.server
            if trainer.phase == 0:
                server = jax.device_get(simulator.server)
            self.best = Best(server, simulator.client_states.keep("best"), round_, trainer.phase, score)
        return result


def score_validation(experiment: Experiment, base: PyTree, adapters: Adapters, numbers: Sequence[int]) -> Scores:
    """Score models on validation data.

    Rejected answers are a fifth of the work: they are scored only where they decide; the end scores them too.
    """
    evaluator = experiment.evaluator
    rejected = experiment.select_by not in evaluator.metrics
    return evaluator(base, {"personal": adapters}, "validation", numbers, rejected=rejected)["personal"].scores


class MetricsWriter(Callback):
    """Append a line per round to `metrics.jsonl`; of several processes the first writes."""

    def on_start(self, trainer: FederatedTrainer, done: int) -> None:
        """Drop lines of rounds that are in no checkpoint: they are run again."""
        experiment, path = trainer.experiment, trainer.experiment.folder / "metrics.jsonl"
        if not processes.is_first() or not (done or path.exists()):
            return
        kept = [line for line in read_metrics(experiment.folder) if line["round"] <= done]
        if lost := done - len(kept):
            experiment.show.note(f"{path} lacks {lost} of {done} rounds: reports leave them out, and nothing else does")
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Append the round's line, on the disk before the checkpoint that follows."""
        if processes.is_first():
            path = trainer.experiment.folder / "metrics.jsonl"
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result.line) + "\n")
                file.flush()
                os.fsync(file.fileno())


class ProgressReporter(Callback):
    """Show every round, and after the last what was odd in all of them."""

    rounds = 0  # since this process began

    def on_start(self, trainer: FederatedTrainer, done: int) -> None:
        """Show how many rounds and validations are left."""
        experiment, run, last = trainer.experiment, trainer.experiment.run, trainer.last_round
        validated = sum(trainer.is_validated(round_) for round_ in range(done + 1, last + 1))
        experiment.show.start(last, f"{run.method} · seed {run.seed}", done, validated)

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Show the line; after the second round what a round takes, for the first one compiles."""
        show = trainer.experiment.show
        show.round(result.line)
        self.rounds += 1
        if self.rounds == 2:
            show.note(f"a round after the first takes {result.seconds:.2g} s, evaluation apart")

    def on_end(self, trainer: FederatedTrainer) -> None:
        """End the display and say what was odd."""
        experiment = trainer.experiment
        experiment.show.finish()
        for sentence in describe_rounds(read_metrics(experiment.folder)):
            experiment.show.note(sentence)


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
