"""Trackers themselves, each where it is installed: what they stored is what `metrics.jsonl` and `results.json` hold.

Nothing leaves the machine: W&B is offline, MLflow has a database, trackio its folder.
"""

import json
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from tracker_drive import SECRET, Drive, make_run

from fedvlm_jax.config.track_options import TRACKERS, TrackOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training.tracking.base import load_tracker, read_record, require
from fedvlm_jax.training.tracking.numbers import flatten_line, flatten_results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run, in an environment in which each tracker keeps what it gets below the test's folder."""
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", "")
    monkeypatch.setenv("FEDVLM_TEST_SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return make_run(tmp_path / "run")


def need(name):
    module = load_tracker(name)
    return pytest.importorskip(module.PACKAGE, reason=f"--track {name} needs {module.REQUIREMENT}")


@pytest.fixture(autouse=True)
def _trackio_here(tmp_path, monkeypatch):
    """trackio reads its folder when it is imported, perhaps by an earlier test."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import sys

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")


def read_tensorboard(folder):
    """Every scalar of the event files, as TensorBoard would show it: later files take rounds back."""
    need("tensorboard")
    from tensorboardX.proto.event_pb2 import Event

    steps: dict[int, dict[str, list[float]]] = {}
    texts = []
    for file in sorted((folder / "tracking" / "tensorboard").iterdir()):
        for content in read_records_of_tensorboard(file):
            event = Event.FromString(content)
            if event.HasField("session_log"):
                steps = {step: numbers for step, numbers in steps.items() if step < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    steps.setdefault(event.step, {}).setdefault(value.tag, []).append(value.simple_value)
                else:
                    texts.append(value.tag)
    assert any(tag.startswith("options") for tag in texts)
    return steps


def read_records_of_tensorboard(file):
    """TFRecord: a length, its checksum, the content, its checksum."""
    content, place = file.read_bytes(), 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        yield content[place + 12 : place + 12 + size]
        place += 16 + size


def read_wandb(folder):
    """What the files of offline runs hold, in the order in which they were written; the results are in the summary."""
    need("wandb")
    steps: dict[int, dict[str, list[float]]] = {}
    for file in sorted((folder / "tracking" / "wandb").glob("offline-run-*/*.wandb")):
        for record in scan_wandb(file):
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = items.get("_step", record.history.step.num)
                for name, value in items.items():
                    if not name.startswith("_"):
                        steps.setdefault(step, {}).setdefault(name, []).append(value)
            for item in record.summary.update if record.HasField("summary") else ():
                name = name_item(item)
                if name.startswith(("test/", "validation/p", "client_", "selected", "validation/z")):
                    steps.setdefault(6, {})[name] = [json.loads(item.value_json)]
    return steps


def name_item(item):
    return item.key or "/".join(item.nested_key)


def scan_wandb(file):
    """LevelDB's log: after 7 bytes of W&B's own, blocks of 32 KiB whose pieces have a checksum, a length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := -place % 32768) and left < 7:
            place += left
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(parts)
            parts = b""


def read_mlflow(folder):
    need("mlflow")
    from mlflow.tracking import MlflowClient

    record = read_record(folder, "mlflow")
    client, steps = MlflowClient(record.place), {}
    for name in client.get_run(record.id).data.metrics:
        for entry in client.get_metric_history(record.id, name):
            steps.setdefault(entry.step, {}).setdefault(name, []).append(entry.value)
    return steps


def read_trackio(folder):
    need("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    record, steps = read_record(folder, "trackio"), {}
    for row in SQLiteStorage.get_logs(record.project, record.name, run_id=record.id):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                steps.setdefault(row["step"], {}).setdefault(name, []).append(value)
    return steps


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
PATIENCE = 120.0  # of a machine that is busy: MLflow makes a database of fifty tables first
EXACT = {"rel": 1e-12}
PRECISION = {"tensorboard": {"rel": 1e-6}}
"""TensorBoard's scalars are float32."""


def expect(folder, clients=("ann", SECRET)):
    """Round -> number -> the values that there should be: one each."""
    record = read_run(folder)
    steps = {line["round"]: flatten_line(line) for line in record.rounds}
    steps[max(steps)] |= flatten_results(record.results, clients)
    return steps


@pytest.mark.parametrize("name", TRACKERS)
def test_what_is_stored_is_what_the_run_s_files_hold(folder, name):
    need(name)
    drive = Drive(folder, name, patience=PATIENCE).run()
    assert not read_record(folder, name).fault, drive.show.notes
    stored, expected = READERS[name](folder), expect(folder)
    assert sorted(stored) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    for step, numbers in expected.items():
        assert all(len(values) == 1 for values in stored[step].values())
        assert {key: value for key, (value,) in stored[step].items()} == pytest.approx(
            numbers, **PRECISION.get(name, EXACT)
        )


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_goes_on_is_one_run_and_no_round_is_there_twice(folder, name):
    need(name)
    Drive(folder, name, patience=PATIENCE).run(stop=4)
    first = read_record(folder, name)
    Drive(folder, name, patience=PATIENCE).run(done=3)  # the checkpoint of round 4 was lost
    record = read_record(folder, name)
    assert (record.id, record.round, record.results, record.fault) == (first.id, 6, 6, "")
    stored, expected = READERS[name](folder), expect(folder)
    assert sorted(stored) == [1, 2, 3, 4, 5, 6]
    for step, numbers in expected.items():
        assert set(stored[step]) == set(numbers)
        assert all(len(values) == 1 for values in stored[step].values()), step


@pytest.mark.parametrize("name", TRACKERS)
def test_nothing_of_the_machine_or_of_people_is_stored(folder, name):
    need(name)
    Drive(folder, name, patience=PATIENCE).run()
    texts = ("hunter2", "/home/alice", SECRET, "ngstr", "fedvlm train")
    if name == "mlflow":
        with sqlite3.connect(folder.parent / "mlflow.db") as base:
            tables = [row[0] for row in base.execute("select name from sqlite_master where type = 'table'")]
            stored = "\n".join(str(row) for table in tables for row in base.execute(f"select * from {table}"))
    else:
        places = {"tensorboard": "run/tracking/tensorboard", "wandb": "run/tracking/wandb", "trackio": "trackio"}
        files = [path for path in (folder.parent / places[name]).rglob("*") if path.is_file()]
        files = [path for path in files if "logs" not in path.parts and not path.name.startswith("debug")]
        stored = "\n".join(path.read_bytes().decode(errors="ignore") for path in files)
    assert "florence" in stored
    assert [text for text in texts if text in stored] == []
    if name == "wandb":
        (file,) = (folder / "tracking" / "wandb").glob("offline-run-*/*.wandb")
        (run,) = [record.run for record in scan_wandb(file) if record.HasField("run")]
        assert (run.host, run.git.remote_url, run.git.commit) == ("", "", "")
        assert not any(record.HasField("stats") or record.HasField("output") for record in scan_wandb(file))


def test_wandb_online_without_a_login_is_refused_before_the_run(folder, monkeypatch):
    need("wandb")
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(folder / "none"))
    with pytest.raises(UserError, match="nobody is logged in to W&B on this machine"):
        require(TrackOptions(("wandb",)))
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    require(TrackOptions(("wandb",)))


def test_a_server_that_never_answers_does_not_hold_a_run(folder, monkeypatch):
    need("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:hunter2@127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        drive = Drive(folder, "mlflow", patience=1.0).run()
        assert time.monotonic() - began < 60, "MLflow itself would try for many minutes"
    (told,) = [note for note in drive.show.notes if "dropped" in note]
    assert "hunter2" not in told
    assert "hunter2" not in Path(folder / "tracking" / "mlflow.json").read_text()
    assert not any(thread.name == "tracker-mlflow" and not thread.daemon for thread in threading.enumerate())


def test_tensorboard_s_disk_that_is_full_is_told(folder, monkeypatch):
    need("tensorboard")
    from tensorboardX.event_file_writer import EventsWriter

    flush, calls = EventsWriter.flush, []

    def fill(self):
        calls.append(1)
        if len(calls) == 3:  # after the options and a round
            raise OSError(28, "No space left on device")
        return flush(self)

    monkeypatch.setattr(EventsWriter, "flush", fill)
    drive = Drive(folder, "tensorboard").run()
    assert [note for note in drive.show.notes if "dropped" in note and "No space left" in note]
    assert read_record(folder, "tensorboard").round == 1
