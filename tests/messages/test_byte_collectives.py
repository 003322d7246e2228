"""Compiled rounds with compression, and with a secure sum, on four devices: one all-reduce, the latter of integers."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.broad


@cache
def run_check():
    script = Path(__file__).with_name("collectives_check.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("way", "kind"), [("int8", "f32"), ("top-k", "f32"), ("secure", "s32")])
def test_one_all_reduce_and_whose_numbers_are_finite(way, kind):
    found = run_check()[way]
    assert found["collectives"] == sorted([["pred", "all-gather"], [kind, "all-reduce"]])
    assert found["alone"] == []


@pytest.mark.parametrize("way", ["int8", "top-k", "secure"])
def test_draws_and_choices_are_the_same_on_other_devices(way):
    assert run_check()[way]["apart"] < 2e-6
