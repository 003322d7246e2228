"""Signals: every one that asks to end is answered by one line, its exit code, and a run that goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import assert_same_adapters, make_folder

HEED = """
import hashlib, sys, time
from fedvlm_jax.cli._process.signals import StoppedError, heed_signals
try:
    with heed_signals():
        print("ready", flush=True)
        {work}
except StoppedError as error:
    print("stopped", error.code, flush=True)
    {after}
"""

CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
"""Minutes, in one call."""

TRAIN = """
import sys, time, types
import fedvlm_jax.distributed, fedvlm_jax.training
from fedvlm_jax.cli.main import main
def train(run, show):
    for name in {files}:
        (run.out / name).write_text("{{}}")
    print("ready", flush=True)
    time.sleep(60)
fedvlm_jax.training.federated_run = types.SimpleNamespace(train=train)
fedvlm_jax.distributed.processes = types.SimpleNamespace(tell_all=lambda decide: decide(), is_first=lambda: True)
main(["train", "--no-baseline"])
"""
"""The command, without jax, which takes its time to be imported."""

SPREAD = """
import pathlib, sys, time
from fedvlm_jax.cli._process.signals import heed_signals
from fedvlm_jax.training.parallel import spread
def work(task):
    pathlib.Path(task).write_text(str(__import__("os").getpid()))
    time.sleep(60)
if __name__ == "__main__":
    with heed_signals():
        list(spread(work, sys.argv[1:], 2))
"""


STARTED = []


def heed_all():
    """Take back what a test run in the background, or under nohup, hands down: signals that are ignored stay so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(program, *words, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_all, **options,
    )  # fmt: skip
    STARTED.append(process)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.fixture(autouse=True)
def leave_nothing_running():
    """A test that fails must not leave a process that keeps a core busy for minutes."""
    yield
    while STARTED:
        STARTED.pop().kill()


# --- The signals themselves ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_what_python_does(number):
    process = start(HEED.format(work="time.sleep(60)", after="pass"))
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"stopped {128 + number}\n"
    assert process.returncode == 0


def test_a_second_signal_ends_what_no_line_of_python_interrupts():
    process = start(HEED.format(work=CALL, after="pass"))
    time.sleep(0.5)  # it is in the call by then
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped" not in said[0]


def test_who_waits_is_told_why():
    process = start(HEED.format(work=CALL, after="pass"))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "a second signal ends it at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_second_signal_ends_the_way_out_too():
    process = start(HEED.format(work="time.sleep(60)", after="time.sleep(60)"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopped 143\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_a_signal_that_was_ignored_stays_ignored():
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + HEED
    process = start(program.format(work="time.sleep(0.5)", after="pass") + "print('through')")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[0] == "through\n"


DROPPING = """import weakref
        class Thing: pass
        def work_long(_):
            end = time.monotonic() + 0.5
            while time.monotonic() < end: pass
        for _ in range(3):
            thing = Thing()
            reference = weakref.ref(thing, work_long)
            del thing
        time.sleep(60)"""


def test_a_signal_that_python_drops_is_sent_again():
    """It is raised in a weak reference's callback, of which jax has many: a node went on as if nobody had asked."""
    process = start(HEED.format(work=DROPPING, after="pass"))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=30)
    assert said == "stopped 143\n"
    assert errors == ""


LATE = """
import atexit, time
from fedvlm_jax.cli._process.signals import ending_at_once
class Late:
    def __del__(self): print("destroyed", flush=True)
with ending_at_once():
    late = Late()
    atexit.register(print, "at the end")
    print("ready", flush=True)
    time.sleep(0.3)  # else what is said would be read with that line
    raise SystemExit({code})
"""


@pytest.mark.parametrize(("code", "told"), [(143, "at the end\n"), (2, "at the end\ndestroyed\n")])
def test_what_threads_may_use_is_not_destroyed_after_a_signal(code, told):
    """XLA's crashed in the middle of a computation: the exit code was that of a segmentation fault."""
    process = start(LATE.format(code=code))
    assert process.communicate(timeout=30)[0] == told
    assert process.returncode == code


# --- What the commands say ---


@pytest.mark.parametrize(
    ("number", "files", "told"),
    [
        (signal.SIGINT, [], "stopped. The run had not begun"),
        (signal.SIGTERM, ["config.json"], "stopped. To go on: fedvlm train --resume runs/"),
        (signal.SIGHUP, ["config.json", "results.json"], "stopped. The run itself is finished; its report: fedvlm rep"),
    ],
)
def test_train_says_how_to_go_on_where_one_can(number, files, told, tmp_path):
    process = start(TRAIN.format(files=files), cwd=tmp_path)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert out == ""
    assert said.startswith(f"fedvlm: {told}")
    assert said.count("\n") == 1
    assert len(list((tmp_path / "runs").iterdir())) == bool(files), "a folder that nothing came to lie in is gone"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number, tmp_path):
    (tmp_path / "work.py").write_text(SPREAD)
    tasks = [tmp_path / "one", tmp_path / "two"]
    process = subprocess.Popen([sys.executable, tmp_path / "work.py", *tasks], stderr=subprocess.PIPE, text=True)
    while not all(task.exists() and task.read_text() for task in tasks):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    workers = [int(task.read_text()) for task in tasks]
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
def test_a_run_that_sigterm_stopped_goes_on_bit_for_bit(tmp_path):
    flags = [
        "--model", str(make_folder(tmp_path / "tiny")), "--train.rounds", "4", "--train.local-steps", "2",
        "--data.languages", "en", "de", "--data.vendors", "noto", "fluent", "--data.images-per-client", "5",
        "--data.validation-per-client", "2", "--data.test-per-client", "3", "--train.batch-size", "4",
        "--lora.rank", "2", "--evaluation.every", "2", "--evaluation.max-answer-tokens", "4",
    ]  # fmt: skip
    command = [sys.executable, "-m", "fedvlm_jax", "train", "--no-baseline"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run([*command, *flags, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, *flags, "--out", str(stopped)], stderr=subprocess.PIPE, text=True)
    while not (stopped / "checkpoints" / "1").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == f"fedvlm: stopped. To go on: fedvlm train --resume {stopped} --no-baseline"
    subprocess.run([*command, "--resume", str(stopped)], check=True, capture_output=True)
    assert_same_adapters(whole, stopped)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, stopped)]
    assert results[0] == results[1]
