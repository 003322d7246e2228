"""What leaves the clients, kept in the run's folder for `fedvlm audit`, where `--audit.keep` asks for it.

A round's file is on the disk before its checkpoint, and those of rounds that are run again are dropped first, so a run
that is killed and resumed keeps the same files, bit for bit.
"""

import jax
import numpy as np

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import fetch
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.memory import GIB
from fedvlm_jax.run_dir import kept_messages
from fedvlm_jax.training.experiment import Experiment, make_simulator
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult


class MessageKeeper(Callback):
    """Keep every round of the federation; of several processes the first writes."""

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
    simulator = make_simulator(experiment)
    simulator.inputs = experiment.blank_inputs
    cohort, found = experiment.layout.cohort, dict[int, int]()
    rounds = range(1, experiment.run.train.rounds + 1)
    for round_ in rounds:
        phase = simulator.phase_of(round_)
        if phase not in found:
            message = simulator.find_messages(simulator.read_round(round_))
            found[phase] = kept_messages.count_bytes(message, simulator.server, cohort)
    return sum(found[simulator.phase_of(round_)] for round_ in rounds)
