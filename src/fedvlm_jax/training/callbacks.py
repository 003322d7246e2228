"""Callbacks of every run: judge a round's clients, account for what it released, write its line, show it, keep it.

The best round has its file.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import fetch
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.memory import GIB
from fedvlm_jax.messages.config import WITHSTANDS
from fedvlm_jax.privacy.budget import Budget
from fedvlm_jax.run_dir import kept_messages, metrics_lines
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training.experiment import Experiment, make_simulator, shape_messages
from fedvlm_jax.training.failures import UNFIT, describe_rounds, describe_unfit, explain_aggregate, explain_all_unfit
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult

LOUD = 10
"""Noise of a round, over its mean update, beyond which a run is told so."""
LOOSE = 3
"""Rounds in which nothing was clipped after which a private run is told so."""


class FiniteCheck(Callback):
    """Name clients whose numbers are not finite; end the run where nobody else is left."""

    def __init__(self, describe_left: Callable[[], str]) -> None:
        """Take what says which checkpoint a run that ends here leaves."""
        self.describe_left = describe_left
        self.known: set[str] = set()  # clients that were reported

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Name them in the line.

        Raises:
            UserError: all clients of a round without noise are unfit, or what became of the others is not finite.
        """
        report, clients = result.report, trainer.experiment.examples.clients
        if not report.finite:
            raise UserError(explain_aggregate(result.round, self.describe_left()))
        if not len(report.unfit):
            return
        names = [clients[number].name for number in report.unfit]
        result.line[UNFIT] = names
        # With differential privacy the round has released its noise, and that a run ends would tell of a client's data.
        goes_on = len(report.counted) > 0 or trainer.experiment.budget is not None
        if goes_on and self.known.issuperset(names):
            return  # to ask again whether they are unfit at rates of 0 would cost a round
        self.known.update(names)
        from_the_start = {clients[number].name for number in trainer.simulator.find_unfit(result.inputs)}
        if not goes_on:
            model, left = trainer.experiment.run.model, self.describe_left()
            raise UserError(explain_all_unfit(result.round, names, from_the_start, model, left))
        trainer.experiment.show.note(describe_unfit(result.round, names, from_the_start))


class PrivacyLedger(Callback):
    """Account for what the rounds so far have released."""

    warned = False  # whether it was said that a round's noise is much larger than its update

    def __init__(self, budget: Budget) -> None:
        """Take the run's privacy."""
        self.budget = budget
        self.unclipped = 0  # rounds so far without an update that was clipped, as long as there is no other

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Add ε and δ to the line of a round that is validated, and a bound of ε, which is fast, to every line."""
        told: dict[str, float] = {"epsilon_bound": self.budget.bound(result.round)}
        if trainer.is_validated(result.round):
            told["epsilon"] = self.budget.spent(result.round)
        # JSON has no infinity.
        known = {name: value for name, value in told.items() if math.isfinite(value)}
        # What stands in the line beside it is of the clients' own numbers, without noise.
        result.line.update({**known, "delta": self.budget.delta, "noise": self.budget.noise, "private": False})
        size = result.line.get("noise_to_update", 0.0)
        if size > LOUD and not self.warned:
            self.warned = True
            trainer.experiment.show.note(
                f"round {result.round}: the noise is {size:.0f} times as large as the clients' mean update, so hardly "
                "anything else is learnt. More clients in a round, a larger epsilon or fewer numbers to send help: "
                "`fedvlm explain METHOD --privacy.*` shows by how much"
            )
        self._watch_clip(trainer, result.line.get("clip_fraction"))

    def _watch_clip(self, trainer: FederatedTrainer, clipped: float | None) -> None:
        """Say once that no update is as long as the clipping norm, with which the noise grows."""
        if clipped is None or self.unclipped < 0:
            return
        self.unclipped = -1 if clipped else self.unclipped + 1
        if self.unclipped == LOOSE and self.budget.quantile is None:
            trainer.experiment.show.note(
                f"no update of {LOOSE} rounds was as long as --privacy.clip {self.budget.clip:g}, so the noise, which "
                "is in proportion to it, is larger than it need be: take a smaller one, or --privacy.quantile 0.5"
            )


class SelectionWriter(Callback):
    """Say of a round whose updates its pool took."""

    weaker = False  # whether it was said that a round had too few clients for the pool

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Add the pool, the clients of whose update nothing went in, and how much of everybody's did."""
        report, experiment = result.report, trainer.experiment
        if report.selection is None:
            return
        options, clients = experiment.run.messages, experiment.examples.clients
        taken = dict(zip(report.numbers.tolist(), report.selection.tolist(), strict=True))
        selection = {clients[number].name: round(taken[number], 4) for number in report.counted.tolist()}
        left_out = [name for name, value in selection.items() if value == 0]
        result.line.update(pool=options.pool, left_out=left_out, selection=selection)
        withstood = result.line.get(WITHSTANDS, options.hostile)
        if withstood < options.hostile and not self.weaker:
            self.weaker = True
            experiment.show.note(
                f"round {result.round}: {format_count(len(report.counted), 'client')} counted, of which "
                f"--messages.pool {options.pool} "
                f"withstands {withstood:.0f} hostile ones, not --messages.hostile {options.hostile}; such rounds say "
                f"so in metrics.jsonl as {WITHSTANDS}"
            )


class MetricsWriter(Callback):
    """Append a line per round to `metrics.jsonl`; of several processes the first writes."""

    def on_start(self, trainer: FederatedTrainer, done: int) -> None:
        """Drop lines of rounds that are in no checkpoint: they are run again."""
        experiment, path = trainer.experiment, trainer.experiment.folder / metrics_lines.NAME
        if processes.is_first() and (lost := metrics_lines.drop_later(experiment.folder, done)):
            experiment.show.note(
                f"{path} lacks {lost} of {format_count(done, 'round')}: reports leave them out, and nothing else does"
            )

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Append the round's line, on the disk before the checkpoint that follows."""
        if processes.is_first():
            metrics_lines.append(trainer.experiment.folder, result.line)


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


class MessageKeeper(Callback):
    """Keep what leaves the clients in every round, for `fedvlm audit`; of several processes the first writes.

    A round's file is on the disk before its checkpoint, and those of rounds that are run again are dropped first, so a
    run that is killed and resumed keeps the same files, bit for bit.
    """

    def on_start(self, trainer: FederatedTrainer, done: int) -> None:
        """Say what will be kept, and drop what is kept of rounds that are run again.

        Raises:
            UserError: it would be more than the options allow.
        """
        experiment, options = trainer.experiment, trainer.experiment.run.audit
        size = count_kept(experiment)
        rounds, cohort = experiment.run.train.rounds, experiment.layout.cohort
        text = f"what {cohort} clients send in {rounds} rounds takes up to {size:,} bytes of the disk"
        if size > options.most_gib * GIB:
            raise UserError(
                f"--audit.keep: {text}, more than --audit.most-gib {options.most_gib:g}: allow more, or take fewer "
                "rounds or a smaller --cohort"
            )
        experiment.show.note(
            f"kept for `fedvlm audit`: {text}; whoever reads it can attack the clients as a server could"
        )
        if processes.is_first():
            kept_messages.drop_later(experiment.folder, done)

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Write the round's file; a round in which nobody counted has none."""
        report = result.report
        if trainer.phase or not len(report.counted):
            return
        messages, server = fetch((report.sent.messages, report.sent.server))
        places = np.flatnonzero(report.sent.weights[: len(report.numbers)] > 0)
        kept = kept_messages.KeptRound(
            result.round,
            report.numbers[places],
            report.sent.weights[places],
            jax.tree.map(lambda leaf: leaf[places], messages),
            server,
        )
        if processes.is_first():
            kept_messages.write_round(trainer.experiment.folder, kept)


def count_kept(experiment: Experiment) -> int:
    """Count the bytes that a run keeps at most, before it has run; nothing is computed."""
    server, cohort = make_simulator(experiment).server, experiment.layout.cohort
    shapes = shape_messages(experiment, range(1, experiment.run.train.rounds + 1))
    return sum(kept_messages.count_bytes(message, server, cohort) for message in shapes.values())
