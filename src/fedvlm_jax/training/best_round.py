"""The best round: models are validated after a round, and those of the best are kept.

With differential privacy those of the last are: a choice by validation data would tell of them what ε does not cover.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.evaluator import Adapters, Scores
from fedvlm_jax.federation.client_states import Slots
from fedvlm_jax.federation.simulator import Moment, RoundReport
from fedvlm_jax.training.experiment import Experiment
from fedvlm_jax.training.final_evaluation import ask_base
from fedvlm_jax.training.personalization import give_models
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult
from fedvlm_jax.utils.progress import working


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
        scores = score_validation(experiment, simulator.base, models, experiment.judged)
        result: dict[str, Any] = {"metric": chosen, **{name: _mean(values) for name, values in scores.items()}}
        if report.trained is not None and experiment.run.evaluation.before_redistribution:
            # Who dropped out has nothing to compare.
            asked = [number for number in report.counted.tolist() if number in experiment.judged]
            before = score_validation(experiment, report.base, report.trained, asked).get(chosen, {})
            result["before_redistribution"] = {chosen: _mean(before)}
            result["after_redistribution"] = {chosen: _mean({name: scores[chosen][name] for name in before})}
        value, loss = result.get(chosen), result.get("loss")
        # Without validation data the newest is the best there is. A model whose loss is not finite is never the best.
        score = (-math.inf, -math.inf) if value is None or loss is None else (value, -loss)
        if (
            value is None
            or experiment.budget is not None
            or (all(map(math.isfinite, score)) and score > self.best.score)
        ):
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


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
