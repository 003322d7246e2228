"""Data, models and options that are not what they were: another content is noticed, whatever its name and time."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up import write_run
from make_parquet import draw_image, make_rows, write_rows
from safetensors.numpy import load_file, save_file
from tiny_run import StopAfter, StopError, make_folder, tiny_run

from fedvlm_jax.cli.main import main
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import Run, TrainOptions
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.unique_images import digest_rows
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import read_vlm
from fedvlm_jax.reporting.report import write_report
from fedvlm_jax.run_dir import fingerprints
from fedvlm_jax.run_dir.absolute_paths import anchor
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.run_dir.config_seal import check_seal, seal
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.run_dir.stored_baseline import read_baseline
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import compare, evaluate, federated_run
from fedvlm_jax.training.local_baseline import train_alone
from fedvlm_jax.utils import digests
from fedvlm_jax.utils.digests import digest_file, digest_files
from fedvlm_jax.utils.progress import SilentProgress

# --- Contents of files ---


def rewrite(file, content):
    """Another content, as long, under the same time stamp."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(file, content):
    """The same by a new file in the place of the old one, as a copy that keeps times does."""
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """Files of 100 bytes are large, and settled at once; the digests that were computed."""
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 100)
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    read = []

    def count(file, kind):
        read.append(file.name)
        return original(file, kind)

    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", count)
    return read


def test_a_large_file_is_read_once(remembering, tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(200))
    small.write_bytes(bytes(99))
    assert len({digest_file(large) for _ in range(3)}) == 1
    assert len(remembering) == 1
    digest_file(small)
    digest_file(small)
    assert len(remembering) == 3


@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_change_under_the_same_name_size_and_time_is_noticed(remembering, tmp_path, change):
    file = tmp_path / "large"
    file.write_bytes(b"a" * 200)
    before = digest_file(file)
    change(file, b"b" * 200)
    assert digest_file(file) != before
    change(file, b"a" * 200)
    assert digest_file(file) == before


def test_what_was_just_written_is_not_remembered(remembering, tmp_path, monkeypatch):
    """A change within the same tick of the clock would not show."""
    monkeypatch.setattr(digests, "SETTLED", 10.0)
    (tmp_path / "large").write_bytes(bytes(200))
    digest_file(tmp_path / "large")
    digest_file(tmp_path / "large")
    assert len(remembering) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"file": 3}', b"\xff"])
def test_a_damaged_memory_costs_time_alone(remembering, tmp_path, content):
    file = tmp_path / "large"
    file.write_bytes(bytes(200))
    before = digest_file(file)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_bytes(content)
    assert digest_file(file) == before


def test_order_counts_and_places_do_not(tmp_path):
    for name, content in (("a/one", b"1"), ("a/two", b"2"), ("b/other", b"1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    one, two, same = (tmp_path / name for name in ("a/one", "a/two", "b/other"))
    assert digest_files([one, two]) == digest_files([same, two]) != digest_files([two, one])
    assert digest_files([one]) != digest_files([one, one])


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"gone cannot be read \(No such file or directory\)"):
        digest_file(tmp_path / "gone")


# --- Tables ---


def read_all(table):
    digests, _ = digest_rows(table, np.arange(len(table)))
    return table.read_text("question"), table.read_text("chosen"), digests


@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_table_replaced_under_the_same_name_and_time_gives_the_new_rows(tmp_path, change):
    """`datasets` goes by name and time stamp and gave the old rows; so did the digests of images beside them."""
    file, other = (write_rows(tmp_path / name, make_rows(6)[part:][:3]) for name, part in (("a", 0), ("b", 3)))
    first = read_all(read_table(str(file)))
    change(file, other.read_bytes())
    second = read_all(read_table(str(file)))
    assert second == read_all(read_table(str(other)))
    assert second != first
    assert read_table(str(file)).digest == read_table(str(other)).digest


def test_a_table_that_changes_while_it_is_read_is_refused_and_not_kept(tmp_path, monkeypatch):
    from fedvlm_jax.data import records_to_arrow

    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    file, other = (write_rows(tmp_path / name, make_rows(6)[part:][:3]) for name, part in (("a", 0), ("b", 3)))
    opened = records_to_arrow.open_cached

    def disturb(*content):
        file.write_bytes(other.read_bytes())
        return opened(*content)

    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(records_to_arrow, "open_cached", disturb)
        with pytest.raises(UserError, match="was changed while it was read"):
            read_table(str(file))
    assert read_all(read_table(str(file))) == read_all(read_table(str(other)))
    file.write_bytes(before)
    assert read_all(read_table(str(file))) != read_all(read_table(str(other)))


# --- Runs ---


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A working folder with data, whose pictures are files, a model, and a run that was stopped after round 1 of 2."""
    place = tmp_path_factory.mktemp("origin")
    rows = make_rows(24)
    (place / "data").mkdir()
    for number, row in enumerate(rows):
        (place / "data" / f"{number}.png").write_bytes(draw_image(number))
        row["image"] = {"bytes": None, "path": f"{number}.png"}
    write_rows(place / "data" / "rows.parquet", rows)
    make_folder(place / "model")
    data = make_options(source="data/rows.parquet", partition="iid", clients=2)
    train = TrainOptions(rounds=2, local_steps=1, batch_size=2)
    with contextlib.chdir(place):
        run = tiny_run(Path("model"), place / "run", data=data, train=train, cohort=None)
        with pytest.raises(StopError):
            federated_run.train(run, StopAfter(1))
    return place


@pytest.fixture
def place(origin, tmp_path):
    """A copy of all that, as if it had been made there."""
    place = tmp_path / "copy"
    shutil.copytree(origin, place)
    rewrite_config(place / "run", lambda text: text.replace(str(origin), str(place)))
    return place


def rewrite_config(folder, change):
    file = folder / "config.json"
    file.write_text(json.dumps(seal(json.loads(change(file.read_text(encoding="utf-8"))))), encoding="utf-8")


def test_a_run_s_folder_holds_absolute_paths(origin):
    run = read_config(origin / "run").run
    assert (run.model, run.data.source) == (str(origin / "model"), str(origin / "data" / "rows.parquet"))
    content = json.loads((origin / "run" / "config.json").read_text(encoding="utf-8"))
    assert content["fingerprint"]["data"] == digest_files([origin / "data" / "rows.parquet"])
    assert set(content["fingerprint"]["clients"]) == set(content["resolved"]["clients"])
    check_seal(origin / "run" / "config.json", content)


def test_names_stay_names_and_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert anchor(Run()) == Run()
    write_rows(tmp_path / "rows" / "a.parquet", make_rows(1))
    data = make_options(source="rows", image_root=Path("pictures"))
    assert anchor(Run(data=data)).data.source == str(tmp_path / "rows")
    assert anchor(Run(data=data)).data.image_root == tmp_path / "pictures"
    assert anchor(anchor(Run(data=data))) == anchor(Run(data=data))
    assert anchor(Run(data=make_options(source="nowhere"))).data.source == "nowhere"


def triple(place):
    file = place / "model" / "model.safetensors"
    save_file({name: 3 * array for name, array in load_file(file).items()}, file, {"format": "pt"})


def edit_rows(place):
    """One word of one answer."""
    rows = make_rows(24)
    for number, row in enumerate(rows):
        row["image"] = {"bytes": None, "path": f"{number}.png"}
    rows[5]["chosen"] += "!"
    write_rows(place / "data" / "rows.parquet", rows)


def edit_text(name, old, new):
    def edit(place):
        text = (place / name).read_text(encoding="utf-8")
        assert old in text
        (place / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


CHANGES = {
    "rows": (edit_rows, r"  the data, \S+rows\.parquet, have another content$"),
    "a picture": (
        lambda place: (place / "data" / "3.png").write_bytes(draw_image(99)),
        "  the client .* has other rows$",
    ),
    "weights": (triple, r"  the weights of the model \S+model are others$"),
    "tokenizer": (
        edit_text("model/tokenizer.json", "{", "{ "),
        r"  tokenizer\.json of the model \S+ has another content$",
    ),
    "processor": (
        edit_text("model/processor_config.json", "0.485", "0.484"),
        r"  processor_config\.json of the model \S+ has another content$",
    ),
    "generation": (
        lambda place: (place / "model" / "generation_config.json").unlink(),
        r"  generation_config\.json of the model \S+ is gone$",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_resumed_run_notices_that_something_else_is_there(place, kind):
    change, told = CHANGES[kind]
    change(place)
    before = sorted(path.name for path in (place / "run").iterdir())
    with pytest.raises(UserError, match=rf"(?m)was not made of what is there now.*\n{told}") as error:
        federated_run.resume(place / "run")
    assert str(error.value).count("\n") == 2, "one thing differs, in one line"
    assert sorted(path.name for path in (place / "run").iterdir()) == before


EDITS = {
    "an option": edit_text("run/config.json", '"learning_rate_a": 0.005', '"learning_rate_a": 0.006'),
    "what was resolved": edit_text("run/config.json", '"train_examples"', '"train_example"'),
    "a fingerprint": edit_text("run/config.json", '"weights": "', '"weights": "0'),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_config_is_noticed(place, kind):
    EDITS[kind](place)
    with pytest.raises(UserError, match=r"config\.json is not as the run wrote it: was it edited, or damaged\?"):
        federated_run.resume(place / "run")


def test_a_config_of_version_0_1_is_told(place):
    file = place / "run" / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["digest"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json has no digest: it is of version 0\.1"):
        federated_run.resume(place / "run")


def test_other_versions_are_said(monkeypatch):
    then = fingerprints.describe_versions()
    notes = []
    fingerprints.tell_versions(then, notes.append)
    assert notes == []
    fingerprints.tell_versions({**then, "jax": "0.0.1"}, notes.append)
    (told,) = notes
    assert f"jax 0.0.1 is now {then['jax']}" in told
    assert "equal bits are not promised" in told


def test_a_run_notes_the_commit_of_its_checkout():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("this is no checkout")
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True).strip()
    assert describe_environment()["commit"] == head


def test_a_report_notices_an_edited_config(tmp_path):
    run = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5})
    nothing = {"data": "", "weights": "", "model_files": {}, "clients": {}}
    rewrite_config(run, lambda text: json.dumps({**json.loads(text), "fingerprint": nothing}))
    assert read_run(run).rounds
    edit_text("run/config.json", '"seed": ', '"seed": 1')(tmp_path)
    with pytest.raises(UserError, match="is not as the run wrote it"):
        read_run(run)


@pytest.fixture
def finished(tmp_path):
    """A run of a comparison, of files that are not there any more; and what is there now."""
    then = {"data": "a", "weights": "b", "model_files": {"config.json": "c"}, "clients": {}}
    folder = write_run(tmp_path / "runs" / "local-seed0", {"a": 0.1}, {"a": 0.2}, anchor(Run(method="local")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(seal({**config, "fingerprint": then})))
    return folder, SimpleNamespace(sources=lambda data: {**then, "data": "other"}, vlm=read_vlm(Run().model))


@pytest.mark.parametrize("method", ["local", "local+ft"])
def test_a_comparison_goes_on_with_no_other_data(finished, method):
    """Finished runs are only read: beside them others would be trained on the new data."""
    folder, loaded = finished
    if method != "local":
        folder.rename(folder.with_name(f"{method}-seed0"))
    comparison = Compare(methods=(method, "plora"), seeds=1, base=Run(out=folder.parent.parent))
    with pytest.raises(UserError, match=r"the data, emoji, have another content"):
        compare.compare(comparison, model=loaded)


@pytest.mark.parametrize("later", [False, True])
def test_training_alone_is_of_the_run_s_own_data(finished, later):
    folder, loaded = finished
    config = json.loads((folder / "config.json").read_text())
    config["run"]["method"] = "plora"
    (folder / "config.json").write_text(json.dumps(seal(config)))
    with pytest.raises(UserError, match=r"the data, emoji, have another content"):
        train_alone(folder, SilentProgress(), (lambda run: loaded) if later else loaded)
    assert not (folder / "baseline").exists()


def test_a_baseline_of_other_data_is_not_shown_and_a_report_of_both_says_so(finished):
    folder, _ = finished
    baseline = Path(shutil.copytree(folder, folder.parent / "copy")).rename(folder / "baseline")
    assert read_baseline(read_run(folder)) is not None
    config = json.loads((baseline / "config.json").read_text())
    config["fingerprint"]["weights"] = "other"
    (baseline / "config.json").write_text(json.dumps(seal(config)))
    assert read_baseline(read_run(folder)) is None
    page = write_report([folder, baseline]).read_text(encoding="utf-8")
    assert "Not on what local-seed0 was trained on: baseline (other base weights)." in page


@pytest.mark.broad
def test_data_and_model_may_move(place, monkeypatch):
    """And nothing else: the run goes on, is evaluated, and may move once more when it is finished."""
    for name in ("data", "model"):
        (place / name).rename(place / f"new-{name}")
    run = place / "run"
    with pytest.raises(UserError, match=r"data/rows\.parquet, .* is not there; if it has moved, .*--data PLACE"):
        federated_run.resume(run)
    data = make_options(source="new-data/rows.parquet")
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"/model, .* is not there; if it has moved, .*--model PLACE"):
        federated_run.resume(run, places=Run(data=data))
    show = SilentProgress()
    federated_run.resume(run, show, places=Run(data=data, model="new-model"))
    assert [line["round"] for line in show.lines] == [2]
    stored = read_config(run).run
    assert (stored.data.source, stored.model) == (str(place / "new-data/rows.parquet"), str(place / "new-model"))
    assert stored.data.partition.kind == "iid"
    results = read_run(run).results
    assert evaluate.evaluate(run)["personal"] == results["personal"]
    (place / "new-data").rename(place / "data")
    with pytest.raises(UserError, match="is not there"):
        evaluate.evaluate(run)
    federated_run.resume(run, places=Run(data=make_options(source="data/rows.parquet")))
    triple_then_evaluate(place, run)


def triple_then_evaluate(place, run):
    (place / "new-model").rename(place / "model")
    triple(place)
    (place / "model").rename(place / "new-model")
    with pytest.raises(UserError, match=r"the weights of the model \S+new-model are others"):
        evaluate.evaluate(run)


def test_moved_data_must_be_the_same(place):
    write_rows(place / "other.parquet", make_rows(24))
    with pytest.raises(UserError, match=r"the data, \S+other\.parquet, have another content"):
        federated_run.resume(place / "run", places=Run(data=make_options(source=str(place / "other.parquet"))))


def test_the_command_takes_places_and_no_other_options(place, capsys):
    write_rows(place / "other.parquet", make_rows(24))
    for flags, told in (
        (["--data", str(place / "other.parquet")], "other.parquet, have another content"),
        (["--data", "x", "--seed", "3"], "leave out --seed\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--resume", str(place / "run"), *flags])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
