"""The round that `benchmarks/speed.py` measures, in float64 on both sides: what is left is no rounding of either's.

In float32 each side's own rounding moves an AdamW round by 1e-4 to 1e-2 of its movement, so it could hide an error.
"""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.cells import compare_factors
from harness.ours import Ours
from harness.peer import Peer
from harness.world import Shape, draw_world
from models import causal_cases

from fedvlm_jax.models import load_vlm, resolve_folder

SIDES = {"florence2-nano": 64, "smolvlm": 32}
"""Model -> side of its pictures; a tiny random one stands for the decoder-only models."""


@pytest.mark.parity
@pytest.mark.parametrize("vision", ["cached", "computed"])
@pytest.mark.parametrize("name", SIDES)
def test_a_round_of_adamw_is_pytorch_s(name, vision, tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
        pytest.skip("needs the extra `parity`: pip install -e '.[parity]'")
    if name in causal_cases.CASES:
        causal_cases.write_model(name, tmp_path)
    folder = tmp_path if name in causal_cases.CASES else resolve_folder(name)
    vlm, params = load_vlm(folder)
    world = draw_world(vlm, params, Shape(3, 4, 1), size=(SIDES[name], SIDES[name]), prompt=8, answer=8)
    with Peer(sys.executable, folder, world) as peer:
        theirs = peer.give_factors((1, "float64"), vision)
    with jax.enable_x64(True):
        vlm, params = load_vlm(folder, dtype=jnp.float64, compute_dtype=jnp.float64)
        start = {path: factor.astype(np.float64) for path, factor in world.start.items()}
        ours = Ours(vlm, params, dataclasses.replace(world, start=start), vision, wave=3)
        ours()
        apart = compare_factors(world.start, ours.give_factors(), theirs)
    print(f"{name}, {vision}: {apart}")  # noqa: T201
    assert apart["movement"] > 0.1
    assert apart["error_of_movement"] < 1e-6  # our rates, and the mean of the updates, are float32 still
