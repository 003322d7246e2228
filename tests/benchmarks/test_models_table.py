"""The table of models: every family is in it, README shows what the script makes, and what does not fit is told."""

import importlib
from pathlib import Path

import models_table
import pytest
from harness.cells import read_lines
from harness.published import SMALLEST

from fedvlm_jax.federation.memory import GIB
from fedvlm_jax.models import read_vlm

ROOT = Path(__file__).parents[2]


def test_every_family_has_a_model_that_is_planned():
    kinds = {config["model_type"] for config in SMALLEST.values()} | {read_vlm("florence2-base").config.model_type}
    names = [file.parent.name for file in (ROOT / "src/fedvlm_jax/models").glob("*/__init__.py")]
    assert len(names) > 5
    families = {name: importlib.import_module(f"fedvlm_jax.models.{name}").FAMILY for name in names}
    left = [name for name, family in families.items() if kinds.isdisjoint(family.model_types)]
    assert left == [], "a family's smallest model belongs into harness/published.py, and its line into the table"
    assert models_table.MODELS.keys() == {*SMALLEST, models_table.FLORENCE}


def test_readme_and_docs_show_what_the_script_makes():
    found = read_lines(models_table.LINES)
    short, whole = models_table.tabulate_short(found), models_table.tabulate(found)
    assert len(short) == len(whole) == 2 + len(models_table.MODELS)
    assert "\n".join(short) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert models_table.LINES.with_suffix(".md").read_text(encoding="utf-8") == "\n".join(whole) + "\n"


FACTS = {
    "parameters": {"vision": 86e6, "decoder": 170e6}, "picture": [512, 512], "image_tokens": 64, "trained": 2.4e6,
    "sent": 2**20,
}  # fmt: skip


def fits(gib):
    return {"memory": {"needed": gib * GIB, "base": GIB}}


REFUSED = {"refused": "more", "needed": 17 * GIB}


@pytest.mark.parametrize(
    ("chips", "expected"),
    [
        ({"v5e:1x1": fits(2)}, "1 × 2.0 GiB"),
        ({"v5e:1x1": REFUSED, "v5e:2x2": fits(9)}, "4 × 9.0 GiB"),
        ({"v5e:1x1": REFUSED, "v5e:2x2": REFUSED}, "more than v5e:2x2"),
        ({}, "not compiled"),
    ],
)
def test_the_smallest_slice_that_fits_is_told(chips, expected):
    model = next(iter(models_table.MODELS))
    lines = {f"{kind}/{model}": cell for kind, cell in {"facts": FACTS, "cpu": REFUSED, **chips}.items()}
    assert models_table.tabulate_short(lines)[-1].endswith(f"| 256 M | 64 | 17.0 GiB | {expected} |")
    assert len(models_table.tabulate(lines)) == 3
