"""What a round with a pool sends between four devices, in the text of its compiled program."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.broad

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


@pytest.mark.parametrize("name", SENT)
def test_a_round_with_a_pool_sends_so_much_and_no_more(name):
    found = run_check(tuple(SENT))[name]
    assert found["collectives"] == SENT[name]
    assert found["error"] < 2e-6
