"""The callback of trackers, with a tracker of our own: what it gets, how it fails, and how runs go on."""

import json
import threading
import tomllib
from pathlib import Path

import pytest
from tracker_drive import SECRET, Drive, FakeTracker, make_run

from fedvlm_jax.config.track_options import TRACKERS
from fedvlm_jax.errors import UserError
from fedvlm_jax.training.tracking import base
from fedvlm_jax.training.tracking.base import read_record, read_tracked
from fedvlm_jax.training.tracking.numbers import flatten_line, flatten_results, list_parameters
from fedvlm_jax.training.tracking.tracker_thread import hide_passwords


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def install(monkeypatch):
    """Puts a tracker in the place of another."""
    installed = {}
    load = base.load_tracker
    monkeypatch.setattr(base, "load_tracker", lambda name: installed.get(name) or load(name))

    def put(tracker, name="wandb"):
        installed[name] = tracker
        return tracker

    return put


def test_a_tracker_gets_the_lines_the_options_and_the_results(folder, install):
    fake, drive = install(FakeTracker()), Drive(folder, "wandb").run()
    assert [step for step, _ in fake.steps] == [1, 2, 3, 4, 5, 6]
    assert fake.steps[1][1] == pytest.approx({
        "loss": 1.5, "aggregation_error": 0.02, "aggregation_error/encoder": 0.04, "aggregation_error/decoder": 0.01,
        "angle_a": 20.0, "update_dissimilarity": 0.2, "bytes_up_per_client": 180_000.0,
        "bytes_down_per_client": 180_000.0, "seconds": 1.5, "clients_per_second": 10.0, "validation/exact_match": 0.2,
        "validation/loss": 1.0, "validation/before_redistribution/exact_match": 0.18,
        "validation/after_redistribution/exact_match": 0.2,
    })  # fmt: skip
    ((step, results),) = fake.results
    assert step == 6
    assert results["test/personal/exact_match"] == 0.625
    assert results["client_1/test/personal/exact_match"] == 0.75
    assert results["client_1/test/zero_shot/exact_match"] == 0.25
    session = fake.sessions[0]
    assert session.record.name == "run"
    assert session.parameters["train.rounds"] == 10
    assert session.parameters["resolved.clients"] == 2
    assert fake.ended == [True]
    assert sorted(drive.show.notes) == ["sending the rest to wandb", "tracked by wandb: fake show"]
    assert threading.current_thread() not in fake.threads, "a run waits for no tracker"


def test_nothing_of_the_machine_or_of_people_is_handed_over(folder, install):
    fake = install(FakeTracker())
    Drive(folder, "wandb").run()
    sent = json.dumps([dict(fake.sessions[0].parameters), fake.steps, fake.results], ensure_ascii=False)
    assert fake.sessions[0].parameters["model"] == "florence"
    for text in ("alice", SECRET, "ngstr", str(folder.parent), "fedvlm train", "Linux"):
        assert text not in sent


def test_clients_are_named_where_that_is_asked_for(folder, install):
    fake = install(FakeTracker())
    Drive(folder, "wandb", client_names=True).run()
    assert fake.results[0][1]["client_0_ann/test/personal/exact_match"] == 0.5
    assert fake.results[0][1]["client_1_Zo___ngstr_m/test/personal/exact_match"] == 0.75


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), SystemExit(3), RuntimeError("a\nb"), KeyError("x")]
)
@pytest.mark.parametrize("at", ["open", "log", "results", "close"])
def test_what_a_tracker_raises_is_told_once_and_another_tracker_goes_on(folder, install, at, fault):
    install(FakeTracker(fault, at))
    whole = install(FakeTracker(), "mlflow")
    drive = Drive(folder, "wandb", "mlflow").run()
    told = [note for note in drive.show.notes if "dropped" in note]
    assert len(told) == 1
    assert told[0].startswith("wandb is dropped, and the run goes on without it: ")
    assert type(fault).__name__ in told[0]
    assert f"fedvlm train --resume {folder}" in told[0]
    assert [step for step, _ in whole.steps] == [1, 2, 3, 4, 5, 6]
    assert whole.ended == [True]
    assert read_record(folder, "wandb").fault
    assert not read_record(folder, "mlflow").fault


@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_a_tracker_that_does_not_answer_is_dropped(folder, install, at):
    fake = install(FakeTracker(at=at))
    fake.held = threading.Event()
    drive = Drive(folder, "wandb", patience=0.3).run()
    fake.held.set()
    assert len([note for note in drive.show.notes if "dropped" in note]) == 1
    assert "within 0 s" in drive.show.notes[-1] or "not answered for 0 s" in drive.show.notes[-1]
    assert read_record(folder, "wandb").fault


def test_what_a_dropped_tracker_lacks_is_sent_when_the_run_is_found_finished(folder, install):
    install(FakeTracker(OSError("gone"), round_=3))
    Drive(folder, "wandb").run()
    assert read_record(folder, "wandb").round == 2
    fake = install(FakeTracker())
    Drive(folder, "wandb").find()
    assert fake.sessions[0].record.id == "fake-7"
    assert [step for step, _ in fake.steps] == [3, 4, 5, 6]
    assert [step for step, _ in fake.results] == [6]
    record = read_record(folder, "wandb")
    assert (record.round, record.results, record.fault) == (6, 6, "")
    again = install(FakeTracker())
    Drive(folder, "wandb").find()
    assert again.sessions == [], "it lacks nothing"


def test_a_run_that_goes_on_sends_no_round_twice(folder, install):
    """It was killed after the line of round 4, with the checkpoint of round 3: round 4 is run again."""
    first = install(FakeTracker())
    Drive(folder, "wandb").run(stop=4)
    assert first.ended == [False]
    assert read_tracked(folder).trackers == ("wandb",)
    rest = install(FakeTracker())
    rest.open_tracker = lambda session: setattr(rest, "sent", 4) or rest  # as it says itself
    Drive(folder, "wandb").run(done=3)
    assert [step for step, _ in first.steps + rest.steps] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in rest.results] == [6]


def test_a_tracker_that_takes_rounds_back_is_asked_to(folder, install):
    install(FakeTracker())
    Drive(folder, "wandb").run(stop=4)
    rest = install(FakeTracker())
    Drive(folder, "wandb").run(done=3)
    assert rest.sessions[0].sent == 3
    assert [step for step, _ in rest.steps] == [4, 5, 6]


def test_a_tracker_that_joins_late_gets_all_rounds(folder, install):
    install(FakeTracker())
    Drive(folder, "wandb").run(stop=4)
    late = install(FakeTracker(), "trackio")
    Drive(folder, "wandb", "trackio").run(done=4)
    assert [step for step, _ in late.steps] == [1, 2, 3, 4, 5, 6]


def test_a_run_is_not_moved_to_another_project(folder, install):
    install(FakeTracker())
    Drive(folder, "wandb", project="mine", name="first").run(stop=2)
    with pytest.raises(UserError, match=r"at wandb already, with --track\.project mine"):
        Drive(folder, "wandb", project="other").run(done=2)
    with pytest.raises(UserError, match=r"at wandb already, with --track\.name first"):
        Drive(folder, "wandb", name="second").run(done=2)
    Drive(folder, "wandb").run(done=2)


def test_a_baseline_stands_beside_its_run(folder, install):
    install(FakeTracker())
    Drive(folder, "wandb", project="mine", name="first").run()
    record = base.make_record(folder / "baseline", "wandb", base.TrackOptions(("wandb",)), beside=folder)
    assert (record.project, record.name, record.group) == ("mine", "first/baseline", "first")
    assert (record.id, record.round, record.results) == ("", 0, 0)


def test_runs_of_a_comparison_are_a_group(tmp_path):
    record = base.make_record(tmp_path / "plora-seed1", "wandb", base.TrackOptions(("wandb",)), within="study")
    assert (record.name, record.group) == ("study/plora-seed1", "study")


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "not readable as JSON"), ("{}", "lacks tracker"), ('{"tracker": "wandb"}', "lacks project")],
)
def test_a_damaged_record_is_named(folder, content, expected):
    file = base.locate(folder, "wandb")
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        read_tracked(folder)
    assert str(file) in str(error.value)


def test_a_record_in_another_s_place_is_refused(folder, install):
    install(FakeTracker())
    Drive(folder, "wandb").run(stop=1)
    base.locate(folder, "wandb").rename(base.locate(folder, "mlflow"))
    with pytest.raises(UserError, match="is the record of wandb"):
        read_tracked(folder)


def test_what_is_not_installed_is_named_with_its_command(monkeypatch, tmp_path):
    (tmp_path / "absent_tracker").mkdir()  # as W&B makes a folder `wandb` where runs are started
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("absent_tracker", "absent_altogether"):
        fake = FakeTracker()
        fake.PACKAGE, fake.REQUIREMENT = package, "absent>=2"
        monkeypatch.setattr(base, "load_tracker", lambda name, fake=fake: fake)
        with pytest.raises(UserError, match=rf"needs the package {package}, which is not installed: pip install 'abs"):
            base.require(base.TrackOptions(("mlflow",)))


def test_numbers_that_are_none_are_left_out():
    line = {"round": 1, "loss": float("nan"), "steps": float("inf"), "validation": None, "on": True, "method": "x"}
    assert flatten_line(line) == {}
    scores = {"test": {"exact_match": {"a": None, "b": float("nan")}}}
    assert flatten_results({"personal": scores, "global": None}, ["a", "b"]) == {}
    many = {"personal": {"test": {"exact_match": {f"c{number}": 1.0 for number in range(33)}}}}
    assert flatten_results(many, [f"c{number}" for number in range(33)]) == {"test/personal/exact_match": 1.0}
    newcomers = {"personal": {"test": {"exact_match": {"z": 0.5}}}}
    assert flatten_results({"held_out": newcomers}, []) == {"test/held_out/personal/exact_match": 0.5}


def test_parameters_hold_no_place():
    run = {"data": {"source": "/srv/x/rows", "path": None}, "system": {"cache_dir": "/c"}, "resume": "/r", "on": True}
    assert list_parameters({"run": run}) == {"data.source": "rows", "on": True}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@db/x: refused", "postgresql://db/x: refused"),
        ("KeyError: 'loss'", "KeyError: 'loss'"),
        ("api_key=abc, more", "api_key=…, more"),
    ],
)
def test_faults_hold_no_password(text, shown):
    assert hide_passwords(text) == shown


def test_every_tracker_has_a_file_and_an_extra():
    root = Path(__file__).parents[3]
    files = {path.stem for path in (Path(base.__file__).parent / "trackers").glob("*.py")} - {"__init__"}
    assert files == set(TRACKERS)
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: extras[name] for name in TRACKERS} == {
        name: [base.load_tracker(name).REQUIREMENT] for name in TRACKERS
    }
