"""The compiled round of a Florence-2, on one, four and eight devices: equal results, one all-reduce, one base."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MESHES = {"plora": ("1x2", "4x2", "8x1"), "fedavg-lora": ("4x1",), "local": ("4x1",)}
CASES = [(method, mesh) for method, meshes in MESHES.items() for mesh in meshes]


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("program_check.py")
    done = subprocess.run(
        [sys.executable, str(script), *(f"{method}={','.join(meshes)}" for method, meshes in MESHES.items())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", MESHES)
def test_no_base_weight_is_copied_per_client(found, method):
    assert found["control"]["copies"], "the search itself finds nothing any more"
    assert found[method]["copies"] == []


@pytest.mark.parametrize(("method", "mesh"), CASES)
def test_meshes_and_waves_agree(found, method, mesh):
    assert found[method]["meshes"][mesh]["error"] < 2e-5


@pytest.mark.parametrize(("method", "mesh"), [case for case in CASES if not case[1].startswith("1x")])
def test_one_all_reduce_and_nothing_else(found, method, mesh):
    collectives = found[method]["meshes"][mesh]["collectives"]
    assert collectives.pop("all-reduce") == (0 if method == "local" else 1)
    assert set(collectives.values()) == {0}
