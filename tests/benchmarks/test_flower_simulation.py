"""`benchmarks/flower_simulation.py` without Flower: processor time of a tree, a peer's other script, and the table."""

import os
import subprocess
import sys

import numpy as np
import pytest
from flower_simulation import describe_ratio, run_peer, tabulate
from harness import process_tree
from harness.peer import Peer
from harness.process_tree import count_tree_seconds
from harness.world import SETTINGS, Shape, World, take_clients

from fedvlm_jax.errors import UserError

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint('burnt', flush=True)\ninput()"
CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\nprint('over', flush=True)\ninput()"


def test_a_tree_s_time_has_a_grandchild_s_while_it_runs_and_after_it():
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout.readline() == "burnt\n"
        running = count_tree_seconds(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "over\n"
        assert 0.3 <= running <= count_tree_seconds(child.pid)
        child.communicate("\n")
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        count_tree_seconds(child.pid)


def test_times_are_found_behind_a_name_that_looks_like_fields(monkeypatch, tmp_path):
    """A child counts once, what it waited for counts too, and another tree does not."""
    tick = os.sysconf("SC_CLK_TCK")
    for pid, parent, times in ((7, 1, (1, 2, 3, 4)), (8, 7, (10, 0, 0, 0)), (9, 1, (100, 0, 0, 0))):
        zeros, ticks = " 0" * 9, " ".join(str(time * tick) for time in times)
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (ray) S 9 (x) R {parent}{zeros} {ticks} 0 0\n")
    monkeypatch.setattr(process_tree, "PROC", tmp_path)
    assert count_tree_seconds(7) == 20


def test_the_first_clients_of_a_world_are_a_world():
    rows = np.arange(12).reshape(3, 4)
    weights = np.asarray([0.25, 0.25, 0.5], np.float32)
    world = take_clients(World(Shape(3, 2, 2), {"labels": rows}, rows.reshape(3, 2, 2), weights, {}, SETTINGS, {}), 2)
    assert world.shape == Shape(2, 2, 2)
    assert world.weights.tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(world.examples["labels"], rows[:2])
    assert world.indices.shape == (2, 2, 2)


PEER = """
import json, sys
for line in sys.stdin:
    if json.loads(line).get("reload"):
        sys.exit("no module named flwr")
    print(json.dumps({"seconds": 2.5, "clients_cpu": 0.5}), flush=True)
"""


def test_a_peer_runs_another_script_and_is_measured_from_outside(tmp_path):
    script, rows = tmp_path / "peer.py", np.zeros((1, 1, 1), np.int32)
    script.write_text(PEER)
    world = World(Shape(1, 1, 1), {}, rows, np.ones(1, np.float32), {}, SETTINGS, {})
    with Peer(sys.executable, tmp_path, world, script, "torch and flwr[simulation]") as peer:
        found = run_peer(peer)
        assert found["cpu"] >= 0
        assert (found["wall"], found["clients_cpu"]) == (2.5, 0.5)
        with pytest.raises(UserError, match=r"no module named flwr; it needs torch and flwr\[simulation\]"):
            run_peer(peer, reload=True)


def test_the_table_has_medians_and_ranges():
    def describe(*seconds):
        return {"cpu": {"median": seconds[1], "all": seconds}, "wall": {"median": seconds[1], "all": seconds}}

    ratio = describe_ratio([2.0, 6.0, 9.0], [1.0, 2.0, 1.0])
    assert ratio == {"median": 3.0, "least": 2.0, "most": 9.0}
    times = {"cpu": ratio, "wall": ratio}
    sides = ("flower", "flower_reload", "loop")
    line = {
        "seconds": {"ours": describe(0.1, 0.25, 1.5), **dict.fromkeys(sides, describe(1.0, 3.0, 4.0))},
        **{f"times_{side}": times for side in sides},
        "adapters": {side: {"error_of_movement": 2.6e-4} for side in sides},
    }
    head, rule, ours, flower, *_ = tabulate({"nano": line})
    assert {row.count("|") for row in (head, rule, ours, flower)} == {8}
    assert ours.startswith("| nano | ours | 0.25 (0.10 to 1.50) | 0.25 (0.10 to 1.50) |")
    assert flower.endswith("| 3.0 (1.0 to 4.0) | 3.0 (1.0 to 4.0) | 3.0 (2.0 to 9.0) | 3.0 (2.0 to 9.0) | 3e-04 |")
