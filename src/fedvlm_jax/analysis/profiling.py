"""`fedvlm train --profile`: where the time of a round goes, as the profiler of jax sees it and by the model's parts.

Traced are the first two rounds of each phase whose program has run before in this process, so that no trace holds a
compilation. Each is a folder of its own that XProf and TensorBoard read, and beside it stand `round-N.json.gz` for
Perfetto, in which every operation is named by the part of the model that asked for it, and `round-N.md`, their shares.

Tracing changes no result: the same compiled program runs, watched. Of several processes each traces its own devices,
which are all that it sees.
"""

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import jax

from fedvlm_jax.analysis import profile_scopes
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.training.trainer import Callback, FederatedTrainer

ROUNDS = 2
"""Rounds that are traced of each phase."""


class RoundProfile(Callback):
    """Trace rounds of one run into its folder."""

    def __init__(self, folder: Path) -> None:
        """Trace into `folder`/profile, and there into a folder per process where there are several."""
        self.folder = folder / "profile"
        if processes.count() > 1:
            self.folder /= f"process-{jax.process_index()}"
        self.written: list[Path] = []
        """The traces for Perfetto, in the order of the rounds."""
        self._ran: set[tuple[int, int]] = set()
        self._traced: Counter[int] = Counter()

    def around_round(self, trainer: FederatedTrainer, round_: int) -> AbstractContextManager[None]:
        """Trace a round, if its program has run before and no two of its phase were traced."""
        simulator = trainer.simulator
        program = (id(simulator), simulator.phase_of(round_))
        warm = program in self._ran
        self._ran.add(program)
        if not warm or self._traced[id(simulator)] >= ROUNDS:
            return nullcontext()
        self._traced[id(simulator)] += 1
        return self._trace(simulator, round_)

    @contextmanager
    def _trace(self, simulator: Simulator, round_: int) -> Generator[None]:
        """Trace what happens inside, and write what Perfetto reads and the shares of the model's parts."""
        folder = self.folder / f"round-{round_}"
        shutil.rmtree(folder, ignore_errors=True)  # a resumed run runs rounds again that no checkpoint has
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--profile: {folder} cannot be made: {error.strerror}") from None
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call as an event would cost more than the round
        with (
            jax.profiler.trace(str(folder), profiler_options=options),
            jax.profiler.StepTraceAnnotation("round", step_num=round_),
        ):
            yield
        found = sorted(folder.rglob("*.trace.json.gz"))
        if not found:
            return
        scopes = profile_scopes.find_scopes(simulator.round_text(round_))
        trace = profile_scopes.label_trace(profile_scopes.read_trace(found[-1]), scopes)
        self.written.append(folder.with_name(f"{folder.name}.json.gz"))
        with gzip.open(self.written[-1], "wt", encoding="utf-8") as opened:
            json.dump(trace, opened)
        table = profile_scopes.tabulate_shares(round_, profile_scopes.share_out_time(trace))
        folder.with_name(f"{folder.name}.md").write_text(table, encoding="utf-8")
