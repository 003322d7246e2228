"""The shipped model, killed with -9 and resumed, ends with the same numbers, bit for bit.

Tiny models do not tell: their features and products round alike in programs that do not at this size.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import assert_same_adapters

pytestmark = pytest.mark.slow

TRAIN = (
    *("--method", "plora", "--train.rounds", "6", "--train.local-steps", "2", "--cohort", "2"),
    *("--data.languages", "en", "de", "--data.vendors", "noto", "fluent", "--data.images-per-client", "24"),
    *("--data.validation-per-client", "4", "--data.test-per-client", "4", "--evaluation.every", "2"),
)
"""Small cohorts: every round asks for pictures that were not computed yet."""

TIMES = ("seconds", "clients_per_second")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `fedvlm train` as a user has it: compiled as it is there, not as tests compile, and kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    environment = {**kept, "FEDVLM_CACHE": str(tmp_path_factory.mktemp("cache"))}

    def train(*words):
        command = [sys.executable, "-m", "fedvlm_jax", "train", *map(str, words)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return train


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The run that nothing happened to. It compiles; those after it take its programs from the cache."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(start(*TRAIN, "--out", folder))
    return folder


def finish(process):
    told = process.communicate()[1]
    assert process.returncode == 0, told


def count_lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def read_lines(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_end(folder, other):
    assert read_lines(folder) == read_lines(other)
    assert_same_adapters(folder, other)
    assert json.loads((folder / "results.json").read_text()) == json.loads((other / "results.json").read_text())


def kill_after(process, folder, lines, delay=0.0):
    """Kill with -9 so many seconds after the line of a round is there; 0: after the folder is a run's."""
    while count_lines(folder) < lines or not (folder / "config.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    "kills",
    [
        [(0, 0.0)],
        [(1, 0.0)],
        [(2, 0.05)],
        [(3, 0.0)],
        [(3, 0.2)],
        [(4, 0.02)],
        [(5, 0.1)],
        [(1, 0.1), (3, 0.0), (5, 0.0)],
    ],
    ids=str,
)
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_killed_run_of_the_shipped_model_ends_as_if_nothing_had_happened(start, straight, tmp_path, cache, kills):
    folder = tmp_path / "run"
    kept = () if cache == "memory" else ("--system.cache", "disk", "--system.cache-dir", tmp_path / "features")
    process = start(*TRAIN, *kept, "--out", folder)
    for lines, delay in kills:
        kill_after(process, folder, lines, delay)
        process = start("--resume", folder)
    finish(process)
    assert_same_end(folder, straight)


def test_the_main_job_killed_after_its_third_round_ends_as_if_nothing_had_happened(start, tmp_path):
    """Sixteen clients and all else by default."""
    words = ("--method", "plora", "--train.rounds", "6", "--no-baseline", "--out")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(start(*words, whole))
    kill_after(start(*words, folder), folder, 3)
    finish(start("--resume", folder))
    assert_same_end(folder, whole)


REMEMBERING = (
    *("--privacy.noise", "0.1", "--privacy.clip", "0.05", "--privacy.quantile", "0.5", "--privacy.delta", "1e-3"),
    *("--messages.compress", "top-k"),
)
"""What a round needs of those before it: the clipping norm that adapts, and what clients owe."""
SECRET = (
    *("--privacy.noise", "1", "--privacy.delta", "1e-3", "--privacy.mechanism", "banded", "--privacy.bands", "2"),
    "--privacy.secret",
)
"""The noise of the round before, and what neither seed nor checkpoint knows."""


def test_a_killed_run_with_noise_ends_as_if_nothing_had_happened(start, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(start(*TRAIN, *REMEMBERING, "--no-baseline", "--out", whole))
    kill_after(start(*TRAIN, *REMEMBERING, "--no-baseline", "--out", folder), folder, 2, 0.05)
    kill_after(start("--resume", folder), folder, 4)
    finish(start("--resume", folder))
    assert_same_end(folder, whole)


def test_a_killed_run_keeps_its_secret_and_its_noise(start, tmp_path):
    """Of two copies of a killed run one is killed again; the noise is nowhere but in what the folder holds."""
    folder, copy = tmp_path / "run", tmp_path / "copy"
    kill_after(start(*TRAIN, *SECRET, "--no-baseline", "--out", folder), folder, 2)
    shutil.copytree(folder, copy)
    finish(start("--resume", folder))
    kill_after(start("--resume", copy), copy, 4, 0.05)
    finish(start("--resume", copy))
    secrets = [json.loads((path / "config.json").read_text())["secret"] for path in (folder, copy)]
    assert secrets[0] == secrets[1]
    assert len(secrets[0]) == 32
    assert_same_end(folder, copy)
