"""Runs and comparisons on a tiny model that are tracked: trackers get lines and results, and nothing else changes."""

import dataclasses

import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run
from tracker_drive import FakeTracker

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import TrainOptions
from fedvlm_jax.config.track_options import TrackOptions
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import compare as comparing
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.tracking import base
from fedvlm_jax.training.tracking.base import read_record
from fedvlm_jax.training.tracking.numbers import flatten_line
from fedvlm_jax.training.tracking.run_tracking import RunTracking
from fedvlm_jax.utils.progress import SilentProgress

pytestmark = pytest.mark.broad

OPTIONS = TrackOptions(("wandb", "mlflow"))


@pytest.fixture
def trackers(monkeypatch):
    """Every time a tracker is opened a new one that keeps what it gets; W&B fails in the third round."""
    opened = []

    class Installed(FakeTracker):
        def open_tracker(self, session):
            fault = OSError(28, "No space left on device") if session.record.tracker == "wandb" else None
            opened.append(FakeTracker(fault, round_=3).open_tracker(session))
            return opened[-1]

    monkeypatch.setattr(base, "load_tracker", lambda name: Installed())
    return opened


def steps_of(opened, name):
    return [step for one in opened if one.sessions[0].record.tracker == name for step in one.steps]


def test_a_tracked_run_is_the_run_stopped_and_resumed_too(model, loaded, tmp_path, trackers):
    plain = federated_run.train(tiny_run(model, tmp_path / "plain"), model=loaded)
    run, show = tiny_run(model, tmp_path / "run"), StopAfter(3)
    with pytest.raises(StopError):
        federated_run.train(run, show, loaded, (RunTracking(OPTIONS),))
    rest = SilentProgress()
    federated_run.resume(run.out, rest, loaded, (RunTracking(OPTIONS),))
    assert_same_adapters(run.out, plain)
    lines = [(line["round"], flatten_line(line)) for line in read_run(run.out).rounds]
    assert steps_of(trackers, "mlflow") == lines
    assert steps_of(trackers, "wandb") == lines[:2]
    assert len([note for note in rest.notes if note.startswith("wandb is dropped")]) == 1
    assert [one.ended for one in trackers if one.sessions[0].record.tracker == "mlflow"] == [[False], [True]]


def test_every_run_of_a_comparison_is_a_run_of_its_group(model, loaded, tmp_path, trackers):
    train = TrainOptions(rounds=1, local_steps=1, batch_size=4)
    base_run = dataclasses.replace(tiny_run(model, tmp_path / "study"), train=train)
    comparison = Compare(methods=("local", "local+ft"), seeds=1, finetune_steps=1, base=base_run)
    folder = comparing.compare(comparison, None, loaded, track=TrackOptions(("mlflow",)))
    records = [one.sessions[0].record for one in trackers]
    assert [record.name for record in records] == ["study/local-seed1", "study/local+ft-seed1"]
    assert {record.group for record in records} == {"study"}
    assert [[step for step, _ in one.steps] for one in trackers] == [[1], [1, 2]], "what it continues is sent too"
    assert read_record(folder / "runs" / "local+ft-seed1", "mlflow").results == 2
    comparing.compare(comparison, None, loaded, track=TrackOptions(("mlflow",)))
    assert len(trackers) == 2, "runs that are finished lack nothing"
