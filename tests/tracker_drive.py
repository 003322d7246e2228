"""A run that never ran, driven through the callback of trackers, and trackers that keep what they get, or fail."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from made_up import write_run

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.config.track_options import TrackOptions
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training.tracking.base import read_record
from fedvlm_jax.training.tracking.run_tracking import RunTracking
from fedvlm_jax.utils.progress import SilentProgress

SECRET = "Zoë Ångström"
SCORES = {"ann": 0.5, SECRET: 0.75}


def make_run(folder: Path) -> Path:
    """A finished run of six rounds whose model lies in a home, and one of whose clients has a person's name."""
    run = Run(model="/home/alice/florence", out=folder)
    return write_run(folder, {"ann": 0.25, SECRET: 0.25}, SCORES, run)


class Drive:
    """Rounds of a made-up run, as the trainer reports them."""

    def __init__(self, folder: Path, *trackers: str, patience: float = 20.0, **options: object) -> None:
        self.folder, self.show = folder, SilentProgress()
        self.callback = RunTracking(TrackOptions(trackers, **options), patience=patience)
        self.trainer = SimpleNamespace(experiment=SimpleNamespace(folder=folder, show=self.show))
        self.lines = read_metrics(folder)

    def run(self, done: int = 0, stop: int = 0, lines: list | None = None) -> "Drive":
        """Run the rounds after `done`; stop after a round, or finish."""
        lines = lines or self.lines
        metrics = self.folder / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:done]))
        try:
            self.callback.on_start(self.trainer, done)
            for line in lines[done : stop or None]:
                with metrics.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                self.callback.on_round(self.trainer, SimpleNamespace(round=line["round"], line=line))
            if stop:
                self._wait_until_sent(stop)
            else:
                self.callback.on_finished(self.folder, self.show)
        finally:
            self.callback.close()
            metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self

    def _wait_until_sent(self, round_: int) -> None:
        """A stopped run waits five seconds for its trackers, in which a busy machine may not even have opened one."""
        end = time.monotonic() + self.callback.patience
        for name in self.callback.options.trackers:
            while time.monotonic() < end:
                record = read_record(self.folder, name)
                if record is not None and (record.round >= round_ or record.fault):
                    break
                time.sleep(0.01)

    def find(self) -> "Drive":
        """Come upon the run when it is finished."""
        self.callback.on_finished(self.folder, self.show)
        self.callback.close()
        return self


class FakeTracker:
    """Keeps what it gets in a list that the test reads; raises or waits where it is told to."""

    PACKAGE, REQUIREMENT = "json", "json"

    def __init__(self, fault: BaseException | None = None, at: str = "log", round_: int = 0) -> None:
        self.fault, self.at, self.round = fault, at, round_
        self.sessions, self.steps, self.results, self.ended = [], [], [], []
        self.threads, self.held = set(), None
        self.id, self.place, self.view, self.sent = "fake-7", "", "fake show", 0

    def check(self) -> None:
        pass

    def open_tracker(self, session):
        self.sessions.append(session)
        self.sent = session.sent
        self._act("open")
        return self

    def log(self, round_, numbers):
        self._act("log", round_)
        self.steps.append((round_, dict(numbers)))

    def log_results(self, round_, numbers):
        self._act("results", round_)
        self.results.append((round_, dict(numbers)))

    def close(self, finished):
        self._act("close")
        self.ended.append(finished)

    def _act(self, at: str, round_: int = 0) -> None:
        self.threads.add(threading.current_thread())
        if self.at == at and round_ >= self.round:
            if self.held is not None:
                self.held.wait(20)
            if self.fault is not None:
                raise self.fault
