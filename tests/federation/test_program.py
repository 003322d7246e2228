"""The compiled round of a Florence-2, on one, four and eight devices: equal results, one all-reduce, one base."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

MESHES = {
    "plora/sft": ("1x2", "4x2", "8x1"),
    "fedavg-lora/sft": ("4x1",),
    "plora/dpo": ("4x2",),
    "local/sft": ("4x1",),
}
ORDINARY = ("plora/sft",)


def mark(case, *more):
    """The other cases compile for a minute: they are slow tests."""
    return pytest.param(case, *more, marks=[] if case in ORDINARY else [pytest.mark.slow])


CASES = [(case, mesh) for case, meshes in MESHES.items() for mesh in meshes]


@lru_cache
def run_check(cases):
    script = Path(__file__).with_name("program_check.py")
    done = subprocess.run(
        [sys.executable, str(script), *(f"{case}={','.join(MESHES[case])}" for case in cases)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def found(case):
    ordinary = case in ORDINARY
    return run_check(tuple(name for name in MESHES if (name in ORDINARY) == ordinary))


@pytest.mark.parametrize("case", [mark(case) for case in MESHES])
def test_no_base_weight_is_copied_per_client(found, case):
    assert found["control"]["copies"], "the search itself finds nothing any more"
    assert found[case]["copies"] == []


@pytest.mark.parametrize(("case", "mesh"), [mark(*case) for case in CASES])
def test_meshes_and_waves_agree(found, case, mesh):
    assert found[case]["meshes"][mesh]["error"] < 2e-5


@pytest.mark.parametrize(("case", "mesh"), [mark(*case) for case in CASES if not case[1].startswith("1x")])
def test_one_all_reduce_and_nothing_else(found, case, mesh):
    collectives = found[case]["meshes"][mesh]["collectives"]
    assert collectives.pop("all-reduce") == (0 if case == "local/sft" else 1)
    assert set(collectives.values()) == {0}
