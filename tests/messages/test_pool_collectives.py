"""What a round with a pool sends between four devices, in the text of its compiled program."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FLAGS = {"all-gather": 1}
"""Whose numbers are finite, which is gathered in every round."""
SENT = {
    "mean": {"all-reduce": 1, **FLAGS},
    "bound": {"all-reduce": 1, **FLAGS},
    "median": {"all-to-all": 1, "all-gather": 2},
    "trimmed": {"all-to-all": 1, "all-gather": 2},
    "krum": {"all-to-all": 1, "all-reduce": 1, "all-gather": 2},
    "multi-krum": {"all-to-all": 1, "all-reduce": 1, "all-gather": 2},
    "geometric": {"all-to-all": 1, "all-reduce": 1, "all-gather": 2},
}
EVERY_TIME = ("bound", "krum")


@cache
def run_check(pools):
    script = Path(__file__).with_name("pools_check.py")
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *pools], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(pools, name):
    found = run_check(pools)[name]
    assert found["collectives"] == SENT[name]
    assert found["error"] < 2e-6


@pytest.mark.parametrize("name", EVERY_TIME)
def test_a_bound_is_one_all_reduce_and_krum_deals_out_once(name):
    check(EVERY_TIME, name)


@pytest.mark.broad
@pytest.mark.parametrize("name", [name for name in SENT if name not in EVERY_TIME])
def test_the_other_pools_send_as_much(name):
    check(tuple(name for name in SENT if name not in EVERY_TIME), name)
