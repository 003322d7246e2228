"""What `--topology` takes and refuses, the table of chips, and the devices that come of it."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from fedvlm_jax.analysis.tpu_topologies import CHIPS, open_devices, parse_topology
from fedvlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "chip", "devices"),
    [
        ("cpu", None, None),
        ("cpu:8", None, 8),
        ("v5e:1x1", CHIPS["v5e"], 1),
        ("v5e:4x4", CHIPS["v5e"], 16),
        ("v6e:16x16", CHIPS["v6e"], 256),
        ("v4:2x2x1", CHIPS["v4"], 4),
        ("v5p:2x2x4", CHIPS["v5p"], 16),
        ("v5p:8x16x16", CHIPS["v5p"], 2048),
    ],
)
def test_topologies(text, chip, devices):
    assert parse_topology(text) == (text, chip, devices)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "there are v4, v5e, v5p, v6e"),
        ("v7:2x2", "nothing is known of v7; there are v4, v5e, v5p, v6e"),
        ("v9:2x2", "nothing is known of v9"),
        ("v5e-16", "how many there are; say which chip and how they are laid out, as in v5e:4x4"),
        ("v5litepod-16", "how many there are"),
        ("cpu:", "expected cpu, or cpu:N"),
        ("cpu:0", "expected cpu, or cpu:N"),
        ("cpu:2x2", "expected cpu, or cpu:N"),
        ("v5e", "there is no such slice; v5e has 1x1, 2x2"),
        ("v5e:16", "there is no such slice"),
        ("v5e:3x3", "there is no such slice; v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v4", "there is no such slice; v4 has 2x2x1"),
        ("v5e:2x2x1", "there is no such slice"),
        ("v5e:32x32", "there is no such slice"),
        ("v5p:4x4", "there is no such slice; v5p has 2x2x1"),
        ("v5p:8x4x4", "ascending order"),
        ("v5p:4x4x6", "there is no such slice"),
        ("v4:16x16x32", "at most 4096 chips"),
        ("v5e:axb", "there is no such slice"),
    ],
)
def test_what_is_no_topology(text, expected):
    with pytest.raises(UserError, match="--topology") as raised:
        parse_topology(text)
    assert expected in str(raised.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[plan\]' in a clone"):
        open_devices(parse_topology("v5e:2x2"))


def test_cpu_devices_of_a_process_that_has_started():
    there = jax.devices("cpu")
    assert open_devices(parse_topology("cpu")) == there
    assert open_devices(parse_topology("cpu:1")) == there[:1]
    with pytest.raises(UserError, match=f"cpu:4096: this process has settled for {len(there)} CPU devices"):
        open_devices(parse_topology("cpu:4096"))


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ("--xla_cpu_copy_insertion_use_region_analysis=true --xla_dump_to=/x --xla_cpu_x=1", "--xla_dump_to=/x"),
        ("--xla_cpu_x=1", ""),
        ("", ""),
        (None, None),
    ],
)
def test_flags_that_only_the_cpu_knows_are_kept_from_libtpu(monkeypatch, flags, left):
    def describe(**described):
        assert os.environ.get("XLA_FLAGS") == left
        return SimpleNamespace(devices=["chip"])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setattr(os, "environ", {} if flags is None else {"XLA_FLAGS": flags})
    assert open_devices(parse_topology("v5e:1x1")) == ["chip"]
    assert os.environ.get("XLA_FLAGS") == flags, "what this process starts gets all of them"


EVERY_SLICE = """
from fedvlm_jax.analysis.tpu_topologies import CHIPS, open_devices, parse_topology
for kind, chip in CHIPS.items():
    axes = len(chip.slices[0].split("x"))
    for slice in (*chip.slices, *(("4x4x8", "8x8x8") if axes == 3 else ())):
        devices = open_devices(parse_topology(f"{kind}:{slice}"))
        corner = "x".join(str(1 + place) for place in devices[-1].coords[:axes])
        print(kind, slice, len(devices), corner, devices[0].device_kind, sep=",")
"""
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@pytest.mark.slow
def test_libtpu_knows_every_slice_of_the_table():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu is not installed: pip install -e ".[plan]"')
    done = subprocess.run([sys.executable, "-c", EVERY_SLICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    opened = [line.split(",") for line in done.stdout.splitlines()]
    assert len(opened) >= sum(len(chip.slices) for chip in CHIPS.values())
    for kind, slice, devices, corner, named in opened:
        assert int(devices) == parse_topology(f"{kind}:{slice}").devices
        assert (corner, named) == (slice, KINDS[kind])
