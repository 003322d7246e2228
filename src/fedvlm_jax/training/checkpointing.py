"""Checkpoints of a run: everything that a later round depends on is in the checkpoint of the round before.

Of several processes the first writes the checkpoints, and all of them know what is in them.
"""

import contextlib
import math
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.federation.client_states import Slots
from fedvlm_jax.training.best_round import Best, BestRound
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult

KEPT = 2
"""The newest checkpoints that are kept: should the last turn out damaged, a run goes on from the one before."""


class CheckpointWriter(Callback):
    """Write checkpoints of the trainer and the best round, and go on from the newest whole one.

    Attributes:
        saved: rounds whose checkpoints are kept.
    """

    def __init__(self, trainer: FederatedTrainer, best: BestRound) -> None:
        """Open the checkpoints in the folder of a trainer's run."""
        self.trainer, self.best, self.folder = trainer, best, trainer.experiment.folder
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=KEPT)
        self.saved: list[int] = []

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Save the last round of a phase, and every few before it."""
        if trainer.ends_phase(result.round) or result.round % trainer.experiment.run.checkpoint_every == 0:
            self._save(result.round)

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: the disk did not take it.
        """
        self.checkpoints.close()

    def describe_newest(self) -> str:
        """Say which checkpoint a run that ends leaves; every one is of a round whose numbers were finite."""
        newest = self.checkpoints.newest()
        left = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is that of round {newest}"
        return f"{left} in {self.folder}"

    def load(self) -> int:
        """Bring the trainer to the newest checkpoint that is whole; return its round, 0 where there is none yet.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        rounds: list[int] = processes.tell_all(self.checkpoints.rounds)
        faults: list[str] = []
        for done in rounds:
            try:
                self._restore(done)
            except DamagedError as error:
                faults.append(str(error))
                del self.trainer.simulators[1:]  # which it may have begun
                continue
            for damaged, fault in zip(rounds, faults, strict=False):
                self.trainer.experiment.show.note(
                    f"{fault}; the run goes on from round {done}, and round {damaged} is run again"
                )
                self.checkpoints.forget(damaged)
            self._keep_older([older for older in rounds if older < done])
            return done
        if faults:
            raise UserError(
                f"{self.folder} cannot be resumed, because none of its checkpoints is whole: {'; '.join(faults)}. Put "
                "the folder back from a copy, or start a new run"
            )
        return 0

    def _state(self) -> PyTree:
        best = self.best.best
        stamps = self.trainer.simulators[best.phase].client_states.stamps(best.slots)
        kept = {"server": best.server, "slots": best.slots, "stamps": stamps}
        return {"simulator": self.trainer.simulator.state(), "best": kept, "last_server": self.trainer.last_server}

    def _save(self, round_: int) -> None:
        best, client_states = self.best.best, self.trainer.simulator.client_states
        # JSON has no infinity.
        score = [value if math.isfinite(value) else None for value in best.score]
        about = {"best_round": best.round, "best_phase": best.phase, "best_score": score}
        client_states.flush()  # before the table that names them
        self._protect(round_, client_states.slots, best.slots)
        self.checkpoints.save(round_, self._state(), about, {"states": client_states.shapes})
        self.saved.append(round_)
        for old in self.saved[:-KEPT]:
            client_states.let_go(old)
            client_states.let_go(("best", old))
        self.saved = self.saved[-KEPT:]

    def _protect(self, round_: int, slots: Slots, best: Slots) -> None:
        """Have no record overwritten that the checkpoint of a round names: a kill or damage may need it again."""
        client_states = self.trainer.simulator.client_states
        client_states.keep(round_, slots.copy())
        if self.best.best.phase == self.trainer.phase:  # records of an earlier phase are not written any more
            client_states.keep(("best", round_), best.copy())

    def _restore(self, done: int) -> None:
        """Stand as after round `done`.

        Raises:
            DamagedError: its checkpoint, or a personal state that it names, is not as it was written.
        """
        trainer, model, federation = self.trainer, self.trainer.experiment.model, self.trainer.simulator
        # A simulator of fine-tuning needs an adapter's form alone: its values are in the checkpoint.
        if trainer.phase_of(done):
            trainer.last_server = jax.device_get(federation.server) if federation.programs.base is not None else {}
            trainer.start_finetuning(federation.adapters, model.params)
        simulator = trainer.simulator
        state, about = self.checkpoints.restore(done, self._state(), {"states": simulator.client_states.shapes})
        trainer.last_server = state["last_server"]
        if trainer.last_server:
            federation.server = replicate(model.mesh, trainer.last_server)
            simulator.params = federation.base
        simulator.load(state["simulator"])
        metric, loss = (-math.inf if value is None else value for value in about["best_score"])
        best, client_states = state["best"], simulator.client_states
        of_best = trainer.simulators[about["best_phase"]].client_states
        self.best.best = Best(best["server"], best["slots"], about["best_round"], about["best_phase"], (metric, loss))
        of_best.recall(best["slots"], best["stamps"])
        of_best.keep("best", best["slots"])
        find = lambda: client_states.find_damage(client_states.slots) or of_best.find_damage(best["slots"])  # noqa: E731
        if fault := processes.tell_all(find):
            raise DamagedError(fault)
        self._protect(done, client_states.slots, best["slots"])
        self.saved = [done]

    def _keep_older(self, rounds: Sequence[int]) -> None:
        """Keep what older checkpoints of this phase name, should the newest turn out to be damaged another time."""
        client_states = self.trainer.simulator.client_states
        for round_ in sorted(rounds):
            if self.trainer.phase_of(round_) == self.trainer.phase:
                with contextlib.suppress(DamagedError):
                    shapes = {"states": client_states.shapes}
                    state, _ = self.checkpoints.restore(round_, self._state(), shapes)
                    for part in (state["simulator"], state["best"]):
                        client_states.recall(part["slots"], part["stamps"])
                    self._protect(round_, state["simulator"]["slots"], state["best"]["slots"])
                    self.saved.insert(-1, round_)  # before the newest
