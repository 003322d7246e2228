"""The compiled round of Florence-2 and SmolVLM on one, four and eight devices: equal results, one all-reduce.

See `test_family_rounds.py` for the programs of all other families.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.broad

MESHES = {"plora/sft": ("4x2", "4x2x2")}
"""Of a case, Florence-2 where it names no family: clients x waves, or clients x waves x model."""

SLOW = {
    "plora/sft": ("8x1", "1x2", "2x4x4", "1x1x2"),
    "fedavg-lora/sft": ("4x1", "4x1x2"),
    "plora/dpo": ("4x2", "4x2x2"),
    "local/sft": ("4x1", "4x1x2"),
    "flora/sft": ("4x2x2",),
    "smolvlm:plora/sft": ("4x2", "4x2x2"),
}
"""These compile for a minute each."""

CUT = 4 * (2 * (1600 + 3 * 20 + 588 + 560) + 2 * (3200 + 6 * 20 + 588 + 560) + 44 * 20)
"""Bytes of the language model that are cut: in two layers each, four (and eight) matrices of 20 x 20, biases of three
(and six), 20 x 28 with a bias and 28 x 20; and 44 words of 20. The vision tower is no argument of a round."""


def mark(*case, slow):
    return pytest.param(*case, slow, marks=[pytest.mark.slow] if slow else [])


TABLES = {False: MESHES, True: SLOW}
CASES = [mark(case, slow=slow) for slow, table in TABLES.items() for case in table]
ON = [(case, mesh, slow) for slow, table in TABLES.items() for case, meshes in table.items() for mesh in meshes]
EVERYWHERE = [mark(case, mesh, slow=slow) for case, mesh, slow in ON]
SPREAD = [mark(case, mesh, slow=slow) for case, mesh, slow in ON if not mesh.startswith("1x")]
SHARED = [mark(case, mesh, slow=slow) for case, mesh, slow in ON if mesh.count("x") == 2]


@lru_cache
def run_check(slow):
    script = Path(__file__).with_name("program_check.py")
    done = subprocess.run(
        [sys.executable, str(script), *(f"{case}={','.join(meshes)}" for case, meshes in TABLES[slow].items())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("case", "slow"), CASES)
def test_no_base_weight_is_copied_per_client(case, slow):
    found = run_check(slow)
    assert found["control"]["copies"], "the search itself finds nothing any more"
    assert found[case]["copies"] == []


@pytest.mark.parametrize(("case", "mesh", "slow"), EVERYWHERE)
def test_meshes_and_waves_agree(case, mesh, slow):
    assert run_check(slow)[case]["meshes"][mesh]["error"] < 2e-6  # a thousandth of a step of Adam at B's rate


@pytest.mark.parametrize(("case", "mesh", "slow"), SPREAD)
def test_one_all_reduce_over_clients_one_flag_of_each_and_nothing_else(case, mesh, slow):
    """Between the devices that share a base there are more, which do not count here."""
    collectives = run_check(slow)[case]["meshes"][mesh]["collectives"]
    reductions = collectives.pop("all-reduce")
    assert reductions == (0 if case == "local/sft" else 1)
    assert collectives.pop("all-gather") == 1, "whose numbers are finite"
    assert set(collectives.values()) == {0}


@pytest.mark.parametrize(("case", "mesh", "slow"), SHARED)
def test_no_cut_weight_is_gathered(case, mesh, slow):
    found = run_check(slow)
    assert found["control"]["gathered"], "the search itself finds nothing any more"
    assert found[case]["meshes"][mesh]["gathered"] == []


def test_a_device_is_given_half_of_the_base():
    meshes = run_check(False)["plora/sft"]["meshes"]
    assert meshes["4x2"]["argument_bytes"] - meshes["4x2x2"]["argument_bytes"] == CUT // 2
