"""Disks that do not take what is written: one line with the file and what to do, and what was finished stays."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from made_up import write_run
from tiny_run import assert_same_adapters, make_folder

from fedvlm_jax.cli import train as command
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import ADVICE, UserError, describe_os_error, naming
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.federation.client_states import ClientStates
from fedvlm_jax.models import load_vlm, save_checkpoint
from fedvlm_jax.reporting import report
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.callbacks import MetricsWriter
from fedvlm_jax.utils.files import write_bytes, write_json
from fedvlm_jax.utils.standard_streams import silence_closed_loops

FULL = "No space left on device (free some space there)"


@contextlib.contextmanager
def limit_files(size):
    """No file may grow beyond so many bytes; what would is refused as a full disk refuses it, but with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        # Python would cut what it compiles of a module there, too, and leave that for all later processes.
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- What an error is told as ---


@pytest.mark.parametrize("number", [*ADVICE, errno.EXDEV])
def test_an_error_is_one_line_with_its_file(number):
    told = describe_os_error(OSError(number, os.strerror(number), "/some/where"))
    assert told.startswith(f"/some/where: {os.strerror(number)}")
    assert ("(" in told) == (number in ADVICE)


def test_an_error_that_names_no_file_gets_one(tmp_path):
    with pytest.raises(OSError, match="No space") as told, naming(tmp_path / "file"):
        Path("/dev/full").write_text("x")
    assert told.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError) as told, naming(tmp_path / "file"):
        (tmp_path / "other").read_text()
    assert told.value.filename == str(tmp_path / "other")


def test_errors_of_libraries_are_one_line_too():
    assert describe_os_error(OSError("no model there\nand a long story")) == "no model there"
    assert describe_os_error(OSError()) == "OSError"


# --- Each thing that is written ---


def test_states(monkeypatch, tmp_path):
    client_states = ClientStates({"a": jax.ShapeDtypeStruct((4,), np.float32)}, 3, tmp_path / "states-0.bin")
    client_states.scatter([0, 1], {"a": np.ones((2, 4), np.float32)})
    kept = client_states.keep("best").copy()

    def refuse(*rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match="No space") as told:
        client_states.scatter([0], {"a": np.zeros((1, 4), np.float32)})
    assert describe_os_error(told.value) == f"{tmp_path / 'states-0.bin'}: {FULL}"
    np.testing.assert_array_equal(client_states.gather([0, 1], kept)["a"], np.ones((2, 4)))


def test_a_checkpoint_that_is_written_in_the_background(tmp_path, caplog):
    """Its error arrives with the next one, or when the run waits for it; the older checkpoints stay."""
    state = {"a": np.random.default_rng(0).normal(size=50_000).astype(np.float32)}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {})
    assert checkpoints.newest() == 1
    with limit_files(100_000):
        checkpoints.save(2, state, {})
        with pytest.raises(OSError, match="File too large") as told:
            checkpoints.save(3, state, {})
        assert told.value.filename == str(tmp_path / "checkpoints")
        assert (told.value.errno, "\n" in describe_os_error(told.value)) == (errno.EFBIG, False)
        with contextlib.suppress(OSError):
            checkpoints.close()
    assert not caplog.records, "the background's traceback is not told as well"
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.newest() == 1
    np.testing.assert_array_equal(again.restore(1, state)[0]["a"], state["a"])
    again.close()


def test_the_last_checkpoint_s_error_arrives_when_all_is_closed(tmp_path):
    state = {"a": np.random.default_rng(0).normal(size=50_000).astype(np.float32)}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with limit_files(100_000):
        checkpoints.save(1, state, {})
        with pytest.raises(OSError, match="File too large"):
            checkpoints.close()


def test_a_merged_model_s_file(model, tmp_path):
    """safetensors writes it, and leaves of the disk's error a text alone."""
    vlm, params = load_vlm(model)
    with limit_files(1000), pytest.raises(OSError, match="File too large") as told:
        save_checkpoint(vlm, params, tmp_path / "merged")
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(tmp_path / "merged" / "model.safetensors"))


@pytest.mark.parametrize(("error", "told"), [("Event loop is closed", False), ("something else", True)])
def test_a_thread_that_ends_another_write_of_a_failed_checkpoint_says_nothing(error, told, monkeypatch, capsys):
    class Ended:
        def __del__(self):  # as native code, it cannot raise: Python's hook is told
            raise RuntimeError(error)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    silence_closed_loops()
    Ended()
    assert (error in capsys.readouterr().err) == told


@pytest.mark.parametrize(("write", "content"), [(write_json, {"a": "x" * 9000}), (write_bytes, bytes(9000))])
def test_a_file_is_written_whole_or_not_at_all(write, content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("{}")
    with limit_files(4096), pytest.raises(OSError, match="File too large") as told:
        write(path, content)
    assert told.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "{}"


def test_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    trainer = SimpleNamespace(experiment=SimpleNamespace(folder=tmp_path))
    with pytest.raises(OSError, match="No space") as told:
        MetricsWriter().on_round(trainer, SimpleNamespace(line={"round": 1}))
    assert describe_os_error(told.value) == f"{tmp_path / 'metrics.jsonl'}: {FULL}"


def test_a_report(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5})
    (run / "report.md").write_text("the old one")
    for name in ("draw_run", "draw_run_health"):
        monkeypatch.setattr(report, name, lambda *args: [])
    with limit_files(700), pytest.raises(SystemExit) as stop:
        main(["report", str(run)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"fedvlm: {run / 'report.md'}: File too large (")
    assert said.count("\n") == 1
    assert (run / "report.md").read_text() == "the old one"


# --- Where a run may not write ---


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_noticed_first(number, tmp_path, monkeypatch):
    """Read-only, another's, full: before a model is looked for, which here there is none of."""

    def refuse(path, *rest):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open" if number in (errno.EROFS, errno.EACCES) else "pwrite", refuse)
    with pytest.raises(UserError) as told:
        federated_run.train(Run(model="no/model", out=tmp_path / "run"))
    assert str(told.value).startswith(f"nothing can be written into {tmp_path / 'run'}: ")
    assert os.strerror(number) in str(told.value)
    assert ADVICE[number] in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/run", "x" * 300, "file", "file/run"])
@pytest.mark.parametrize("words", [["train"], ["compare"], ["data"], ["plan"]])
def test_places_that_are_no_folder(folder, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", folder])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert folder in said
    assert "choose" in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [["train", "--resume"], ["evaluate"], ["report"]])
@pytest.mark.parametrize("folder", ["/dev/null", "x" * 300, "file/run", "a\0b"])
def test_places_where_no_run_can_be(folder, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*words, folder])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ((), "The run had not begun"),
        (("config.json",), "To go on: fedvlm train --resume "),
        (("config.json", "results.json"), "its report: fedvlm report "),
    ],
)
def test_train_says_how_to_go_on(files, told, tmp_path, monkeypatch):
    def fail(run, show):
        with Claim(run.out):
            for name in files:
                (run.out / name).write_text("{}")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "states-0.bin")

    monkeypatch.setattr(federated_run, "train", fail)
    with pytest.raises(UserError, match=f"^states-0.bin: No space left on device .*{told}"):
        command.train(Run(out=tmp_path / "run"), baseline=False)


# --- A disk that is full ---


@pytest.fixture
def small_disk(tmp_path):
    """-> a function that gives a disk so many KiB; only an administrator can have one."""
    place = tmp_path / "disk"
    place.mkdir()

    def give(size):
        kind = "remount," if os.path.ismount(place) else ""
        made = ["mount", "-t", "tmpfs", "-o", f"{kind}size={size}k", "tmpfs", str(place)]
        if subprocess.run(made, capture_output=True, check=False).returncode:
            pytest.skip("no small disk can be mounted here: it takes an administrator of a machine that allows it")
        return place

    yield give
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_a_run_writes(small_disk, tmp_path):
    """The disk grows little by little, so that it is full at other places: states, checkpoints, adapters, the page."""
    flags = [
        "--model", str(make_folder(tmp_path / "tiny")), "--train.rounds", "4", "--train.local-steps", "2",
        "--data.languages", "en", "de", "--data.vendors", "noto", "fluent", "--data.images-per-client", "5",
        "--data.validation-per-client", "2", "--data.test-per-client", "3", "--train.batch-size", "4",
        "--lora.rank", "2", "--evaluation.every", "2", "--evaluation.max-answer-tokens", "4",
    ]  # fmt: skip
    words = [sys.executable, "-m", "fedvlm_jax", "train", "--no-baseline"]
    whole, out = tmp_path / "whole", small_disk(4) / "run"
    subprocess.run([*words, *flags, "--out", str(whole)], check=True, capture_output=True)
    ends = []
    for size in (8, 60, 200, 300, 420, 8000):
        small_disk(size)
        again = ["--resume", str(out)] if (out / "config.json").exists() else [*flags, "--out", str(out)]
        done = subprocess.run([*words, *again], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        last = done.stderr.splitlines()[-1]
        ends.append(last)
        assert done.returncode == 2, done.stderr
        assert last.startswith("fedvlm: ")
        assert FULL in last, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0
    assert len({end.split(": No space")[0] for end in ends}) >= 3, ends
    assert_same_adapters(whole, out)
    assert json.loads((whole / "results.json").read_text()) == json.loads((out / "results.json").read_text())
    assert (out / "report.html").is_file()
