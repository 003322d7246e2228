"""A world, our round in it, and a peer's side of the protocol, with a peer that is made up."""

import json
import sys

import jax
import numpy as np
import pytest
from harness import peer as peers
from harness.cells import compare_factors
from harness.ours import Ours
from harness.peer import Peer
from harness.world import Shape, draw_world, write_world
from tiny_run import make_folder

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm

SHAPE = Shape(clients=2, steps=2, batch=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("bench") / "model")
    vlm, params = load_vlm(folder)
    return folder, vlm, params, draw_world(vlm, params, SHAPE, size=(32, 32), prompt=4, answer=3)


@pytest.mark.broad
def test_kept_features_change_nothing_but_time_and_a_run_can_be_repeated(tiny):
    _, vlm, params, world = tiny
    cached, computed = (Ours(vlm, params, world, vision, 2) for vision in ("cached", "computed"))
    assert cached() > 0
    first = cached.give_factors()
    assert computed() > 0
    apart = compare_factors(world.start, first, computed.give_factors())
    assert apart["movement"] > 0.01
    assert apart["error_of_movement"] < 1e-3
    cached()
    for path, factor in cached.give_factors().items():
        np.testing.assert_array_equal(factor, first[path], err_msg=path)
    assert cached.inside > 0
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 0 < cached.measure_without_base() < cached.measure().total + base


def test_a_world_is_written_with_all_that_a_peer_needs(tiny, tmp_path):
    *_, world = tiny
    write_world(world, tmp_path / "world.npz")
    with np.load(tmp_path / "world.npz") as file:
        arrays = dict(file)
    assert json.loads(str(arrays["settings"]))["rank"] == world.settings.rank
    assert arrays["indices"].shape == (2, 2, 2)
    assert arrays["example/pixel_values"].shape[:2] == (2, 4)
    assert {name for name in arrays if name.startswith("start/")} == {f"start/{path}" for path in world.start}


PEER = """
import json, sys
for line in sys.stdin:
    order = json.loads(line)
    if order.get("clients") is None and order["threads"] == 3:
        sys.exit("no module named torch")
    seconds = order["threads"] + (order["form"] == "autocast") / 2
    print(json.dumps({"seconds": seconds}), flush=True)
"""


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    monkeypatch.setattr(peers, "SCRIPT", script)


def test_the_peer_gets_its_best_threads_and_form(tiny, made_up):
    folder, *_, world = tiny
    with Peer(sys.executable, folder, world) as peer:
        assert peer.choose("cached", "float32", (2, 1)) == (1, "float32")
        assert peer.choose("cached", "bfloat16") == (1, "bfloat16")
        assert peer.runner((2, "autocast"), "computed")() == 2.5


def test_what_a_peer_dies_of_is_told(tiny, made_up):
    folder, *_, world = tiny
    with (
        pytest.raises(UserError, match="no module named torch; it needs torch"),
        Peer(sys.executable, folder, world) as peer,
    ):
        peer.ask((3, "float32"), "cached")
    with pytest.raises(UserError, match="/nowhere/python: No such file or directory; name a Python that has torch"):
        Peer("/nowhere/python", folder, world)


def test_the_peer_s_program_is_found():
    assert peers.SCRIPT.is_file()
