"""The compiled rounds of all families but Florence-2, on two shares of clients and a base cut in two.

One all-reduce, no base weight per client, no gather inside of a step; see `test_compiled.py` for Florence-2 and for
what such programs compute.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax import models
from fedvlm_jax.models.registry import list_families

pytestmark = pytest.mark.broad

TESTS = Path(__file__).parents[1]

FAMILIES = {
    "smolvlm": "smolvlm",
    "qwen3-vl": "qwen3_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "llava": "llava",
    "paligemma2": "paligemma",
    "gemma3": "gemma3",
    "clip": "clip",
    "smolvlm-tied": "smolvlm",  # one head of keys for four of queries
    "idefics3": "idefics3",
    "internvl": "internvl",
    "llava_onevision": "llava_onevision",
    "paligemma": "paligemma",
    "smolvlm:tower": "smolvlm",
    "qwen3-vl:tower": "qwen3_vl",
    "qwen2.5-vl:tower": "qwen2_5_vl",
    "clip:tower": "clip",
}
"""Case -> its `model_type`."""


@pytest.fixture(scope="module")
def found():
    """What the programs of all cases hold, by case."""
    script = Path(__file__).with_name("family_rounds_check.py")
    paths = [TESTS, TESTS.parent / "benchmarks", os.environ.get("PYTHONPATH", "")]  # as pytest has it
    done = subprocess.run(
        [sys.executable, str(script), *FAMILIES],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", FAMILIES)
def test_one_all_reduce_between_clients_one_flag_of_each_and_nothing_else(case, found):
    assert found[case]["between_clients"] == {"all-reduce": 1, "all-gather": 1}


@pytest.mark.parametrize("case", FAMILIES)
def test_no_base_weight_is_copied_per_client(case, found):
    assert found["control"]["copies"], "the search itself finds nothing any more"
    assert found[case]["copies"] == []


@pytest.mark.parametrize("case", FAMILIES)
def test_cuts_cost_no_gather(case, found):
    assert found["control"]["inside"], "the search itself finds nothing any more"
    assert found[case]["gathered"] == []
    if not case.endswith(":tower"):  # where image tokens have a gradient, their projection's is made whole
        assert found[case]["inside"] == []


def test_every_kind_of_model_is_looked_at(monkeypatch):
    monkeypatch.setattr(models, "__path__", models.__path__[:1])  # other tests put packages of theirs beside
    kinds = {kind for family in list_families() for kind in family.model_types if "florence2" not in family.model_types}
    assert kinds <= {*FAMILIES.values()}
