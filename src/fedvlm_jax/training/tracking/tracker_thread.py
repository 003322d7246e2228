"""A tracker in a thread of its own: the run hands over and never waits; what fails or is slow is dropped.

All calls of a tracker come from its thread, opening included. The thread is a daemon: a call that never returns keeps
no process from ending.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple

from fedvlm_jax.errors import explain_error
from fedvlm_jax.training.tracking.base import Numbers, Session, Tracker, write_record


class _Job(NamedTuple):
    """Numbers of a round, or the results after it."""

    round: int
    numbers: Numbers
    is_results: bool = False


class _End(NamedTuple):
    finished: bool


class TrackerThread:
    """Send a run to a tracker, in the order in which it is handed over.

    Attributes:
        record: of the run at the tracker, as far as it has got.
        fault: why the tracker is dropped; "" as long as it is not.
    """

    def __init__(self, folder: Path, session: Session, open_tracker: Callable[[Session], Tracker]) -> None:
        """Open the tracker, and begin to send it what will be handed over of the run in a folder."""
        self.record, self.fault = dataclasses.replace(session.record, fault=""), ""
        self._folder, self._session, self._open = folder, session, open_tracker
        self._jobs: SimpleQueue[_Job | _End] = SimpleQueue()
        self._lock = Lock()  # of the record and the fault
        self._began: float | None = time.monotonic()  # the call that the thread is in
        self._thread = Thread(target=self._run, name=f"tracker-{session.record.tracker}", daemon=True)
        self._thread.start()

    def send(self, round_: int, numbers: Numbers, *, is_results: bool = False) -> None:
        """Hand over the numbers of a round, or the results of a run whose last round it is."""
        self._jobs.put(_Job(round_, numbers, is_results))

    def check(self, patience: float) -> None:
        """Drop the tracker where it has been in one call for longer than so many seconds."""
        began = self._began
        if began is not None and time.monotonic() - began > patience:
            self._drop(f"it has not answered for {patience:.0f} s")

    def finish(self, finished: bool, patience: float) -> None:
        """Wait until all is sent; what is not after so many seconds stays unsent, and the tracker is dropped."""
        self._jobs.put(_End(finished))
        self._thread.join(patience)
        if self._thread.is_alive():
            self._drop(f"what was left was not sent within {patience:.0f} s")

    def _run(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._open(self._session)
            self._serve(tracker)
        except BaseException as error:  # a library may raise anything, SystemExit too
            self._drop(explain_error(error))
            with suppress(BaseException):  # it may still take it that the run is stopped
                if tracker is not None:
                    tracker.close(False)

    def _serve(self, tracker: Tracker) -> None:
        sent = tracker.sent
        self._note(id=tracker.id, place=tracker.place, view=tracker.view, round=sent)
        while not self.fault:
            self._began = None
            job = self._jobs.get()
            self._began = time.monotonic()
            if isinstance(job, _End):
                tracker.close(job.finished)
                return
            if job.is_results:
                tracker.log_results(job.round, job.numbers)
                self._note(results=job.round)
            elif job.round > sent:
                tracker.log(job.round, job.numbers)
                self._note(round=job.round)

    def _note(self, **changes: str | int) -> None:
        """Keep in the run's folder how far the tracker has got."""
        with self._lock:
            if not self.fault:
                self.record = dataclasses.replace(self.record, **changes)  # type: ignore[arg-type]  # names of fields
                write_record(self._folder, self.record)

    def _drop(self, fault: str) -> None:
        with self._lock:
            if self.fault:
                return
            self.fault = hide_passwords(fault)
            self.record = dataclasses.replace(self.record, fault=self.fault)
            with suppress(OSError):  # the disk may be what failed
                write_record(self._folder, self.record)


def hide_passwords(text: str) -> str:
    """Write the addresses in a text without user and password, and what follows a word like key or token not at all.

    >>> hide_passwords("no answer from https://ann:secret@example.org/?token=abc")
    'no answer from https://example.org/?token=…'
    """
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1", text)
    return re.sub(r"(?i)(\b\w*(?:key|token|password|secret)[=:]\s*)[^\s&,;]+", r"\1…", text)
