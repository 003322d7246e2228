"""trackio: a database in `$TRACKIO_DIR`, or the Space or server that its own variables name.

Sent are the numbers and the options, without the name of the user and the machine's load.
"""

import shlex
from importlib import import_module
from typing import Any

from fedvlm_jax.training.tracking.base import Numbers, Session

PACKAGE, REQUIREMENT = "trackio", "trackio>=0.43,<1"


def check() -> None:
    """Require nothing but a disk, unless its variables name a server."""


def open_tracker(session: Session) -> "TrackioRun":
    """Begin a run, or go on with the one that has the record's name.

    Raises:
        RuntimeError: another run has taken the name since.
    """
    return TrackioRun(session)


class TrackioRun:
    """A run at trackio; a round is a step, and the results are logged at the last."""

    def __init__(self, session: Session) -> None:
        record = session.record
        self._run: Any = import_module("trackio").init(
            project=record.project, name=record.name, group=record.group, config=dict(session.parameters),
            resume="allow" if record.id else "never", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        self._run.config.pop("_Username", None)
        self.id, self.place, self.sent = str(self._run.id), "", record.round
        if record.id and self.id != record.id:
            raise RuntimeError(f"project {record.project} has another run that is called {record.name}")
        self.view = f"trackio show --project {shlex.quote(record.project)}"
        if record.id:  # its thread writes twice a second: a kill may have kept it from what was handed over
            storage: Any = import_module("trackio.sqlite_storage").SQLiteStorage
            has = storage.get_max_step_for_run(record.project, record.name, run_id=self.id)
            self.sent = self.sent if has is None else has

    def log(self, round_: int, numbers: Numbers) -> None:
        """Log the numbers of a round."""
        self._run.log(dict(numbers), step=round_)

    def log_results(self, round_: int, numbers: Numbers) -> None:
        """Log the results, at the last round."""
        self.log(round_, numbers)

    def close(self, finished: bool) -> None:
        """Write what is left."""
        del finished
        self._run.finish()
