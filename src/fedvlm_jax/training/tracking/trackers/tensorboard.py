"""TensorBoard: event files in `RUN/tracking/tensorboard`, written by tensorboardX; TensorBoard itself only shows them.

Numbers there are float32. A run that goes on has TensorBoard drop what it had of the rounds that are sent again.
"""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

from fedvlm_jax.training.tracking.base import Numbers, Session, Value

PACKAGE, REQUIREMENT = "tensorboardX", "tensorboardX>=2.6.5,<3"


def check() -> None:
    """Require nothing but a disk."""


def open_tracker(session: Session) -> "TensorboardRun":
    """Begin a file of events, whose rounds take the place of those after `session.sent` in files before it.

    Raises:
        OSError: the disk does not take it.
    """
    return TensorboardRun(session)


class TensorboardRun:
    """A run's file of events. Its writer has no thread: one that has would hide that a disk is full."""

    def __init__(self, session: Session) -> None:
        self._events: Any = import_module("tensorboardX.proto.event_pb2")
        self._summary: Any = import_module("tensorboardX.summary")
        folder = session.folder / "tensorboard"
        self.id, self.place, self.sent = session.record.name, "", session.sent
        self.view = f"tensorboard --logdir {_shorten(folder)}"
        folder.mkdir(parents=True, exist_ok=True)
        known = any(folder.iterdir())
        # The name has whole seconds, and a second file of the same second would take the first one's place.
        suffix = f".{time.time_ns() % 10**9:09d}"
        self._file: Any = import_module("tensorboardX.event_file_writer").EventsWriter(str(folder / "events"), suffix)
        self._parameters = dict(session.parameters)
        if known:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._file.write_event(self._events.Event(wall_time=time.time(), step=self.sent + 1, session_log=start))
        else:
            self._write(0, self._summary.text("options", _tabulate(self._parameters)))
        self._file.flush()

    def log(self, round_: int, numbers: Numbers) -> None:
        """Write the numbers of a round, each as a scalar."""
        for name, value in numbers.items():
            self._write(round_, self._summary.scalar(name, value))
        self._file.flush()

    def log_results(self, round_: int, numbers: Numbers) -> None:
        """Write the results as scalars, and the options beside them for the tab that compares runs by these."""
        self.log(round_, numbers)
        for summary in self._summary.hparams(self._parameters, dict.fromkeys(_choose(numbers), 0.0)):
            self._write(round_, summary)
        self._file.flush()

    def close(self, finished: bool) -> None:
        """Close the file."""
        del finished
        self._file.close()

    def _write(self, round_: int, summary: Any) -> None:
        self._file.write_event(self._events.Event(wall_time=time.time(), step=round_, summary=summary))


def _choose(numbers: Numbers) -> list[str]:
    return [name for name in numbers if name.startswith(("test/personal/", "test/zero_shot/"))]


def _tabulate(parameters: dict[str, Value]) -> str:
    rows = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in parameters.items()]
    return "\n".join(["| option | value |", "| --- | --- |", *rows])


def _shorten(folder: Path) -> Path:
    """Name a folder from the working folder, where it lies in there."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
