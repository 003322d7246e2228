"""Callbacks of every run: judge a round's clients, write the round's line, show it; the best round has its file."""

from collections.abc import Callable

from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.run_dir import metrics_lines
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training.failures import UNFIT, describe_rounds, describe_unfit, explain_aggregate, explain_all_unfit
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult


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
