"""Bits that flip on the disk: a checkpoint or a personal state that is not what was written is told, never used."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.federation.client_states import ClientStates
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import federated_run
from fedvlm_jax.utils.progress import SilentProgress

STATE = {"server": {"b": np.linspace(-1, 1, 4000, dtype=np.float32).reshape(40, 100)}, "slots": np.arange(7)}
SHAPES = {"a": jax.ShapeDtypeStruct((3, 5), np.float32), "count": jax.ShapeDtypeStruct((), np.int32)}
RECORD = 3 * 5 * 4 + 4 + 16


def flip(file, at, bit=0):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def make_states(numbers, value):
    a = np.full((len(numbers), 3, 5), value, np.float32) + np.asarray(numbers, np.float32)[:, None, None]
    return {"a": a, "count": np.full(len(numbers), value, np.int32)}


# --- Checkpoints ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints") / "written"
    checkpoints = Checkpoints(folder)
    for round_ in (1, 2):
        checkpoints.save(round_, STATE, {"best_score": [0.25, None]})
    checkpoints.close()
    return folder


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_or_reason(checkpoints):
    try:
        return checkpoints.restore(2, STATE)
    except DamagedError as error:
        return str(error)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_told_or_changes_nothing(written, tmp_path):
    files = list_files(written / "2")
    assert len(files) > 4
    told = 0
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        file = folder / "2" / name
        if not file.stat().st_size:
            continue
        flip(file, file.stat().st_size // 2, bit=number % 8)
        checkpoints = Checkpoints(folder)
        found = read_or_reason(checkpoints)
        if isinstance(found, str):
            told += 1
            assert "checkpoint of round 2 is damaged" in found
            assert "\n" not in found
        else:
            jax.tree.map(np.testing.assert_array_equal, found, (STATE, {"best_score": [0.25, None]}))
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, STATE)[0], STATE)
        checkpoints.close()
    assert told >= 2, "the arrays' file and the JSON at least"


@pytest.mark.parametrize("what", ["cut", "empty", "gone", "swapped"])
@pytest.mark.parametrize("part", ["state", "about"])
def test_a_checkpoint_whose_files_are_not_whole_is_told(written, tmp_path, part, what):
    folder = tmp_path / "checkpoints"
    shutil.copytree(written, folder)
    files = [path for path in (folder / "2" / part).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if what == "gone":
        shutil.rmtree(folder / "2" / part)
    elif what == "swapped":  # whole, and of another moment
        other = Checkpoints(tmp_path / "other")
        other.save(2, jax.tree.map(lambda leaf: leaf + 1, STATE), {"best_score": [0.5, None]})
        other.close()
        shutil.rmtree(folder / "2" / part)
        shutil.copytree(tmp_path / "other" / "2" / part, folder / "2" / part)
    else:
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2] if what == "cut" else b"")
    checkpoints = Checkpoints(folder)
    with pytest.raises(DamagedError, match="checkpoint of round 2 is damaged"):
        checkpoints.restore(2, STATE)
    checkpoints.close()


# --- Personal states ---


def test_a_flipped_bit_anywhere_in_a_record_is_told(tmp_path):
    file = tmp_path / "states.bin"
    client_states = ClientStates(SHAPES, 4, file)
    client_states.scatter([0, 1, 2], make_states([0, 1, 2], 1))
    for at in range(RECORD, 2 * RECORD):
        flip(file, at, bit=at % 8)
        with pytest.raises(DamagedError, match=r"states\.bin is damaged: the client's state at its bytes 80 to 160"):
            client_states.gather([0, 1])
        client_states.gather([0, 2, 3])
        assert "is damaged" in client_states.find_damage(client_states.slots)
        flip(file, at, bit=at % 8)
    assert client_states.find_damage(client_states.slots) is None


def test_a_record_of_another_time_or_place_is_told(tmp_path):
    """Whole in itself: a lost write, a file that was copied while it was written, two records that changed places."""
    file = tmp_path / "states.bin"
    client_states = ClientStates(SHAPES, 4, file)
    client_states.scatter([0, 1], make_states([0, 1], 1))
    early = file.read_bytes()
    client_states.scatter([0, 1], make_states([0, 1], 2))
    late = file.read_bytes()
    assert len(early) == len(late) == 2 * RECORD
    for content in (early, early[:RECORD] + late[RECORD:], late[RECORD:] + late[:RECORD]):
        file.write_bytes(content)
        with pytest.raises(DamagedError, match="not the one that was written there"):
            client_states.gather([0, 1])
    file.write_bytes(late)
    np.testing.assert_array_equal(client_states.gather([0, 1])["count"], [2, 2])


# --- Whole runs ---


@pytest.fixture(scope="module")
def whole(model, loaded, tmp_path_factory):
    """The run, never stopped."""
    return federated_run.train(tiny_run(model, tmp_path_factory.mktemp("runs") / "whole"), model=loaded)


@pytest.fixture(scope="module")
def stopped(model, loaded, tmp_path_factory):
    """The same, stopped after round 3: the checkpoints of rounds 2 and 3 are there."""
    run = tiny_run(model, tmp_path_factory.mktemp("runs") / "stopped")
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(3), loaded)
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == ["2", "3"]
    return run.out


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def damage(folder, round_):
    """Flip a bit in the arrays of a checkpoint."""
    files = (path for path in (folder / "checkpoints" / str(round_) / "state").rglob("*") if path.is_file())
    file = max(files, key=lambda path: path.stat().st_size)
    flip(file, file.stat().st_size // 2)


def damage_state(folder, newest, older):
    """Flip a bit in a record that `newest` names and `older` does not."""
    named = [set(read_slots(folder, round_)) for round_ in (newest, older)]
    slot = min(named[0] - named[1])
    file = folder / "states-0.bin"
    size = file.stat().st_size // (1 + max(max(slots) for slots in named))
    flip(file, slot * size + size // 3)


def read_slots(folder, round_):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        restored = manager.restore(round_, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    clients = len(json.loads((folder / "config.json").read_text())["resolved"]["clients"])
    # Leaves lie in the order of their names: best/slots, best/stamps, simulator/slots, simulator/stamps.
    return [slot for slot in restored["int64"].reshape(-1, clients)[2].tolist() if slot >= 0]


@pytest.mark.parametrize("kind", ["checkpoint", "state"])
def test_a_damaged_newest_checkpoint_is_told_and_the_older_one_is_used(loaded, whole, copy, kind):
    if kind == "checkpoint":
        damage(copy, 3)
    else:
        damage_state(copy, 3, 2)
    show = SilentProgress()
    federated_run.resume(copy, show, loaded)
    (told,) = [note for note in show.notes if "damaged" in note]
    assert "the run goes on from round 2, and round 3 is run again" in told
    assert [line["round"] for line in show.lines] == [3, 4]
    assert [line["round"] for line in read_metrics(copy)] == [1, 2, 3, 4]
    assert_same_adapters(copy, whole)


@pytest.mark.parametrize(("kept", "lost"), [(None, 3), ([0, 2], 1)])
def test_lines_that_were_lost_are_told(loaded, whole, copy, kept, lost):
    """Of the rounds before: a report without them would look as if they had never been."""
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.unlink()
    if kept:
        file.write_text("".join(lines[at] for at in kept))
    show = SilentProgress()
    federated_run.resume(copy, show, loaded)
    (told,) = [note for note in show.notes if "metrics.jsonl" in note]
    assert f"metrics.jsonl lacks {lost} of 3 rounds" in told
    assert len(read_metrics(copy)) == 4 - lost
    assert_same_adapters(copy, whole)


def test_where_no_checkpoint_is_whole_the_run_ends_with_one_line_and_stays_as_it_is(loaded, copy):
    damage(copy, 2)
    damage(copy, 3)
    before = list_files(copy)
    with pytest.raises(
        UserError, match=r"none of its checkpoints is whole: .*round 3 is damaged.*round 2 is damaged"
    ) as told:
        federated_run.resume(copy, model=loaded)
    assert "\n" not in str(told.value)
    assert list_files(copy) == before


def test_the_older_checkpoint_stays_whole_in_a_resumed_run(loaded, whole, copy, monkeypatch):
    """Killed in round 4, after the clients' states were written and before the checkpoint was; then 3 goes bad."""

    def fail(self, round_, *rest):
        raise StopError

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(StopError):
        federated_run.resume(copy, model=loaded)
    monkeypatch.undo()
    damage(copy, 3)
    show = SilentProgress()
    federated_run.resume(copy, show, loaded)
    assert [line["round"] for line in show.lines] == [3, 4]
    assert_same_adapters(copy, whole)
