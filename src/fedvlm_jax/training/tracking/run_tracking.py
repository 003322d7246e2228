"""The callback that gives a run's lines, options and results to trackers, as the run's own files have them.

What a tracker has is remembered beside the run, so a resumed run goes on where each of them is, and a finished one
sends what a tracker lacks: a tracker that was dropped, or that is new.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedvlm_jax.config.track_options import TrackOptions, check_tracking
from fedvlm_jax.distributed import processes
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.run_dir.validated_files import read_config, read_results
from fedvlm_jax.training.tracking import base
from fedvlm_jax.training.tracking.base import FOLDER, PATIENCE, Record, Session, Tracker
from fedvlm_jax.training.tracking.numbers import flatten_line, flatten_results, list_parameters
from fedvlm_jax.training.tracking.tracker_thread import TrackerThread
from fedvlm_jax.training.trainer import Callback, FederatedTrainer, RoundResult
from fedvlm_jax.utils.progress import Progress, SilentProgress, working

STOPPED = 5.0
"""Seconds that a run which ends early gives its trackers."""


class RunTracking(Callback):
    """Give one run's numbers to trackers; of several processes the first does.

    >>> options = TrackOptions(("tensorboard",))
    >>> callback = RunTracking(options)  # for the `callbacks` of `federated_run.train` and `resume`
    """

    def __init__(
        self, options: TrackOptions, within: str = "", beside: Path | None = None, patience: float = PATIENCE
    ) -> None:
        """Take the trackers.

        Args:
            options: which, and how the run is called there.
            within: the name of the comparison that the run is a part of.
            beside: the folder of the run that this one is a baseline of.
            patience: seconds to wait for a tracker before it is dropped.

        Raises:
            UserError: an option cannot work.
        """
        check_tracking(options)
        self.options, self.patience = options, patience
        self._part_of: dict[str, Any] = {"within": within, "beside": beside}
        self._threads: list[TrackerThread] = []
        self._shown: set[str] = set()
        self._begun = False
        self._show: Progress = SilentProgress()
        self._folder = Path()

    def on_start(self, trainer: FederatedTrainer, done: int) -> None:
        """Open the trackers, and send the lines that they lack.

        Raises:
            UserError: a tracker is not installed, or a record of what it has is damaged or of another project.
        """
        self._begin(trainer.experiment.folder, trainer.experiment.show, done, lambda record: True)

    def on_round(self, trainer: FederatedTrainer, result: RoundResult) -> None:
        """Hand over the round's line."""
        self._send(result.round, flatten_line(result.line))

    def on_finished(self, folder: Path, show: Progress) -> None:
        """Hand over the results, and wait for the trackers; of a run that was finished before, what they lack.

        Raises:
            UserError: as `on_start`, of a run that was finished before.
        """
        if not processes.is_first() or not self.options.trackers or not (lines := read_metrics(folder)):
            return
        last = lines[-1]["round"]
        if not self._begun:
            self._begin(folder, show, last, lambda record: record.results < last or record.round < last)
        if not self._threads:
            return
        results, clients = read_results(folder / "results.json"), read_config(folder).clients
        for thread in self._threads:
            numbers = flatten_results(results, clients, names=thread.record.client_names)
            thread.send(last, numbers, is_results=True)
        self._end(finished=True, patience=self.patience)

    def close(self) -> None:
        """Let go of the trackers of a run that ended early."""
        self._end(finished=False, patience=min(STOPPED, self.patience))

    def _begin(self, folder: Path, show: Progress, done: int, is_wanted: Callable[[Record], bool]) -> None:
        self._begun = True
        if not processes.is_first() or not self.options.trackers:
            return
        self._folder, self._show = folder, show
        parameters = list_parameters(read_config(folder).content)
        records = [base.make_record(folder, name, self.options, **self._part_of) for name in self.options.trackers]
        wanted = list(filter(is_wanted, records))
        base.require(TrackOptions(tuple(record.tracker for record in wanted)))
        for record in wanted:
            session = Session(folder / FOLDER, record, min(record.round, done), parameters)
            self._threads.append(TrackerThread(folder, session, _open_late(record.tracker)))
        for line in read_metrics(folder):
            self._send(line["round"], flatten_line(line))

    def _send(self, round_: int, numbers: base.Numbers) -> None:
        for thread in self._threads:
            thread.check(self.patience)
            if not thread.fault:
                thread.send(round_, numbers)
        self._tell()

    def _end(self, finished: bool, patience: float) -> None:
        threads, self._threads = self._threads, []
        for thread in threads:
            if not thread.fault:
                with working(self._show, f"sending the rest to {thread.record.tracker}"):
                    thread.finish(finished, patience)
        self._tell(threads)

    def _tell(self, threads: list[TrackerThread] | None = None) -> None:
        """Say once where a run can be looked at, and once why a tracker is dropped."""
        for thread in self._threads if threads is None else threads:
            name, view, fault = thread.record.tracker, thread.record.view, thread.fault
            if view:
                self._note(f"tracked by {name}: {view}")
            if fault:
                self._note(
                    f"{name} is dropped, and the run goes on without it: {fault}. Once the run is finished, this sends "
                    f"what it lacks: fedvlm train --resume {self._folder}"
                )

    def _note(self, text: str) -> None:
        if text not in self._shown:
            self._shown.add(text)
            self._show.note(text)


def _open_late(name: str) -> Callable[[Session], Tracker]:
    """Return what opens a tracker: its package is imported in the tracker's thread."""
    return lambda session: base.load_tracker(name).open_tracker(session)
