"""Two commands and one folder: who comes second is told who has it, and nothing of the first is touched."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
from made_up import write_comparison, write_run
from tiny_run import StopError, make_folder

from fedvlm_jax.cli.main import main
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting import report
from fedvlm_jax.run_dir import folder_lock
from fedvlm_jax.run_dir.absolute_paths import anchor
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import compare, evaluate, federated_run
from fedvlm_jax.utils.cache_folders import FOLDER, find_arrow

HOLD = "import pathlib, sys\nfrom fedvlm_jax.run_dir.folder_lock import Claim\nClaim(pathlib.Path(sys.argv[1]))\n"
HOLD += "print('mine', flush=True); sys.stdin.read()"


@pytest.fixture
def holder():
    """-> a function that has another process hold a folder until the test ends."""
    started = []

    def hold(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "mine\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def list_files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- The claim ---


def test_another_process_has_it_until_it_dies(holder, tmp_path):
    folder = tmp_path / "run"
    first = holder(folder)
    with pytest.raises(UserError) as told:
        Claim(folder)
    assert f"{folder} is in use: process {first.pid} on {os.uname().nodename} has it since 2" in str(told.value)
    assert "\n" not in str(told.value)
    first.kill()
    first.wait()
    assert (folder / folder_lock.LOCK).is_file(), "a kill leaves the file, and no lock"
    with Claim(folder):
        pass
    assert folder.is_dir()


def test_one_thread_at_a_time_too(tmp_path):
    with Claim(tmp_path / "run"), pytest.raises(UserError, match=rf"in use: process {os.getpid()} on"):
        Claim(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "made for nothing"


def test_only_one_of_many_gets_it(tmp_path):
    """All are let go at once, each in a folder that none has made yet."""
    for number in range(20):
        folder, start, won = tmp_path / str(number), threading.Barrier(8), []

        def race(folder=folder, start=start, won=won):
            start.wait()
            with contextlib.suppress(UserError):
                won.append(Claim(folder))

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].leave()


def test_a_file_that_its_owner_takes_away_is_no_claim(tmp_path, monkeypatch):
    """Who opened the file before its owner left it locks a file that nobody else can find."""
    first, flock = Claim(tmp_path), fcntl.flock

    def leave_meanwhile(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.leave()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", leave_meanwhile)
    with Claim(tmp_path), pytest.raises(UserError, match="in use"):
        Claim(tmp_path)


@pytest.mark.parametrize("said", ["", "{", "[]", "\0\0", '{"command": 7}', '{"command": "\\u001b[2J", "host": []}'])
def test_whatever_the_file_of_a_holder_says(said, tmp_path):
    with Claim(tmp_path) as claim:
        (claim.folder / folder_lock.LOCK).write_text(said)
        with pytest.raises(UserError, match="in use") as told:
            Claim(tmp_path)
    assert str(told.value).isprintable()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        Claim(tmp_path),
        pytest.raises(UserError, match=rf"in use: process {os.getpid()}.*if it is gone, delete .*held"),
    ):
        Claim(tmp_path)
    with Claim(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / folder_lock.STAND_IN).mkdir()
    for host, free in ((os.uname().nodename, True), ("elsewhere", False)):
        (tmp_path / folder_lock.LOCK).write_text(json.dumps({"host": host, "process": dead.pid}))
        if free:
            with Claim(tmp_path):
                pass
            (tmp_path / folder_lock.STAND_IN).mkdir()
        else:
            with pytest.raises(UserError, match="on elsewhere"):
                Claim(tmp_path)


def test_names_of_one_second_are_unlike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 1, 2, 3, 4, 5)
    names = [folder_lock.make_folder("plora", now).name for _ in range(3)]
    assert names == ["2026-01-02-030405-plora", "2026-01-02-030405-plora-2", "2026-01-02-030405-plora-3"]


@pytest.mark.parametrize("kind", ["file", "below a file", "device", "long", "dangling link", "loop"])
def test_what_no_folder_can_be(kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "device": Path("/dev/null"),
        "long": tmp_path / ("x" * 300),
        "dangling link": tmp_path / "link",
        "loop": tmp_path / "loop" / "run",
    }[kind]
    with pytest.raises(UserError, match=str(folder)[:60]) as told:
        Claim(folder)
    assert "\n" not in str(told.value)
    assert "choose" in str(told.value)
    assert (tmp_path / "file").read_text() == "mine"


# --- The commands ---


def test_every_command_that_writes_is_refused_before_it_loads(holder, tmp_path):
    """The model named is none, so whoever came as far as loading would say so."""
    run = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5})
    comparison = write_comparison(tmp_path / "comparison", {"local": {0: {"a": 0.5}}}, {0: {"a": 0.2}})
    wanted = Run(model="no/model", out=run)
    holder(run)
    holder(comparison)
    holder(tmp_path / "new")
    before = list_files(tmp_path)
    for command in (
        lambda: federated_run.train(wanted),
        lambda: federated_run.resume(run),
        lambda: federated_run.extend(run, Run(out=tmp_path / "other")),
        lambda: federated_run.extend(tmp_path / "comparison" / "local-0", Run(method="local", out=tmp_path / "new")),
        lambda: evaluate.evaluate(run),
        lambda: report.write_report([run]),
        lambda: report.write_report([comparison]),
        lambda: compare.compare(Compare(methods=("local",), base=Run(model="no/model", out=comparison))),
    ):
        with pytest.raises(UserError, match=r"is in use: process \d+ on"):
            command()
    assert list_files(tmp_path) == before


def test_reading_goes_on_while_a_run_is_under_way(holder, tmp_path, monkeypatch):
    runs = [write_run(tmp_path / name, {"a": 0.2}, {"a": 0.5}) for name in ("one", "two")]
    holder(runs[0])
    assert len(read_metrics(runs[0])) == 6
    for name in ("draw_run", "draw_run_health"):
        monkeypatch.setattr(report, name, lambda *args: [])
    assert report.write_report(runs).parent.name == "report-one-and-1-more"


def test_a_folder_is_held_for_as_long_as_its_run(tmp_path, monkeypatch):
    """A second command of the same folder, begun while the first runs, changes nothing of it."""
    run, states = Run(out=tmp_path / "run"), []

    def execute(run, *rest):
        shutil.copytree(write_run(tmp_path / "made", {"a": 0.2}, {"a": 0.5}, run), run.out, dirs_exist_ok=True)
        (run.out / "results.json").unlink()
        before = list_files(run.out)
        for command in (lambda: federated_run.train(run), lambda: federated_run.resume(run.out)):
            with pytest.raises(UserError, match=f"in use: process {os.getpid()} on"):
                command()
        assert list_files(run.out) == before
        states.append("trained")
        raise StopError

    monkeypatch.setattr(federated_run, "_execute", execute)
    with pytest.raises(StopError):
        federated_run.train(run)
    assert states == ["trained"]
    assert not (run.out / folder_lock.LOCK).exists()
    with Claim(run.out):
        pass


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    for path in ("no/model/at/all", str(tmp_path / "model")):
        with pytest.raises(UserError):
            federated_run.train(Run(model=path, out=tmp_path / "runs" / "one"))
        assert not (tmp_path / "runs" / "one").exists()


def test_a_folder_with_no_run_is_not_advised(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty: choose another --out$"):
        federated_run.train(Run(out=tmp_path))
    assert not (tmp_path / folder_lock.LOCK).exists()


CAFE = os.fsdecode(b"caf\xe9")
"""A name in Latin-1, as an older system writes it: no JSON file takes it, and pyarrow calls the file damaged."""


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out", CAFE],
        ["train", "--data", f"{CAFE}/a.parquet"],
        ["train", "--model", f"./{CAFE}"],
        ["train", "--lora.targets", f"q_proj|{CAFE}"],
        ["compare", "--system.cache-dir", CAFE],
        ["report", CAFE],
    ],
)
def test_a_name_in_another_encoding_is_one_line_before_anything_is_done(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert r"caf\udce9" in said
    assert "no UTF-8: give that another name" in said


def test_a_folder_in_another_encoding_is_told_where_paths_begin_in_it(tmp_path, monkeypatch):
    (tmp_path / CAFE / "data").mkdir(parents=True)
    (tmp_path / CAFE / "data" / "rows.parquet").touch()
    monkeypatch.chdir(tmp_path / CAFE)
    with pytest.raises(UserError, match=r"the path .*caf\\udce9/data' has bytes that are no UTF-8"):
        anchor(Run(data=make_options(source="data")))
    for name in (FOLDER, "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / CAFE))
        with pytest.raises(UserError, match=r"the folder of caches .*caf\\udce9.* has bytes"):
            find_arrow()
        monkeypatch.delenv(name)


@pytest.mark.slow
def test_two_commands_of_one_moment(tmp_path):
    """One trains, the other ends with one line; the folder is as if there had been one command."""
    command = [sys.executable, "-m", "fedvlm_jax", "train", "--model", str(make_folder(tmp_path / "tiny"))]
    command += [
        "--no-baseline",
        "--train.rounds",
        "2",
        "--data.images-per-client",
        "8",
        "--data.validation-per-client",
        "4",
    ]
    command += ["--data.test-per-client", "4", "--evaluation.max-answer-tokens", "4", "--out", str(tmp_path / "run")]
    started = [subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], said
    winner, loser = codes.index(0), codes.index(2)
    assert f"is in use: process {started[winner].pid} on" in said[loser]
    assert said[loser].count("\n") == 1
    assert [line["round"] for line in read_metrics(tmp_path / "run")] == [1, 2]
