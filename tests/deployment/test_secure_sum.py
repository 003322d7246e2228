"""The secure mean: all four stages in one process, over Flower's own code.

Tests that need Flower are skipped without it. In an environment of its own, which needs no jax:

    pip install 'flwr>=1.42,<1.43' pytest hypothesis
    PYTHONPATH=src python -m pytest -m '' tests/deployment/test_secure_sum*.py
"""

import io
import math
from importlib.util import find_spec

import numpy as np
import pytest
from secure_sum import LocalGrid, make_messages, run_sum

from fedvlm_jax.deployment.flower import secure_sum
from fedvlm_jax.deployment.flower.secure_sum import answer_stage, ask_mean, count_needed
from fedvlm_jax.errors import UserError

needs_flower = pytest.mark.skipif(
    find_spec("flwr") is None, reason="needs Flower: pip install 'fedvlm-jax[flower]', in an environment of its own"
)
STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
ENTRIES = 2_000


def keep(*pairs):
    """Nodes 1, 2, … that keep a vector and a weight each."""
    kept = {node: (np.asarray(vector, np.float32), weight) for node, (vector, weight) in enumerate(pairs, 1)}
    return {node: lambda header, node=node: kept[node] for node in kept}


def ask(grid, **changes):
    numbers = {"clip": 1.0, "largest_weight": 4.0, "threshold": 2, "timeout": 0.1} | changes
    return ask_mean(grid, grid.get_node_ids(), {"round": 3}, **numbers)


@needs_flower
def test_a_mean_worked_out_by_hand():
    grid = LocalGrid(keep(([0.5, -1], 1), ([0.25, 0], 2), ([0, 1], 1)))
    mean = ask(grid)
    np.testing.assert_allclose(mean.vector, [0.25, 0], atol=1e-8)
    assert (mean.vector.dtype, mean.nodes, mean.lost, mean.messages) == (np.float32, [1, 2, 3], {}, 4)
    assert sorted(grid.stages) == sorted((node, stage) for node in (1, 2, 3) for stage in STAGES)


@needs_flower
@pytest.mark.parametrize("weights", [(11, 13), (1, 1000)])
@pytest.mark.parametrize("nodes", [3, 4, 9])
def test_the_error_of_the_mean(nodes, weights):
    """A tenth of a per mille is asked for; it is float32's own rounding, whatever the number of nodes."""
    _, error = run_sum(*make_messages(nodes, weights, ENTRIES))
    assert error < 1e-7


@needs_flower
def test_the_error_where_the_heaviest_node_by_far_leaves():
    """The others were rounded as small shares of its weight."""
    messages, _ = make_messages(9, (1, 1), ENTRIES)
    mean, error = run_sum(messages, np.array([1] * 8 + [1000]), [(9, "collect_masked_vectors")])
    assert mean.nodes == [1, 2, 3, 4, 5, 6, 7, 8]
    assert error < 1e-4


@needs_flower
def test_entries_at_the_edge_of_the_range_do_not_wrap():
    grid = LocalGrid(keep(*[([1, -1, 0], 4)] * 9))
    assert ask(grid, threshold=2 / 3).vector.tolist() == [1, -1, 0]


@needs_flower
@pytest.mark.parametrize("node", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_a_node_that_leaves(stage, node):
    """One that has sent its vector counts. In flwr alone the first two stages' losses end the round."""
    messages, weights = make_messages(3, (1, 1000), ENTRIES)
    mean, error = run_sum(messages, weights, [(node, stage)])
    assert mean.nodes == [1, 2, 3] if stage == "unmask" else sorted({1, 2, 3} - {node})
    assert mean.lost == ({} if stage == "unmask" else {node: "no reply within 0.2 s"})
    assert error < 1e-4


@needs_flower
def test_nodes_that_leave_one_by_one():
    messages, weights = make_messages(9, (1, 1000), ENTRIES)
    mean, error = run_sum(messages, weights, [(4, "setup"), (2, "share_keys"), (7, "collect_masked_vectors")])
    assert mean.nodes == [1, 3, 5, 6, 8, 9]
    assert error < 1e-6


@needs_flower
@pytest.mark.parametrize(
    ("vector", "weight", "reason"),
    [
        ([0, -1.001], 1, "an entry of 1.001 is beyond 1, which the server allows: not sent"),
        ([0, math.nan], 1, "an entry of nan is beyond 1"),
        ([0, 0], 4.5, "a weight of 4.5 is not between 0 and 4: not sent"),
        ([0, 0], 0, "a weight of 0 is not"),
    ],
)
def test_what_does_not_fit_is_not_sent(vector, weight, reason):
    """Neither cut nor let through: the mean is that of the others."""
    mean = ask(LocalGrid(keep(([0.5, -1], 1), (vector, weight), ([0, 1], 1))))
    np.testing.assert_allclose(mean.vector, [0.25, 0], atol=1e-8)
    assert mean.nodes == [1, 3]
    assert reason in mean.lost[2]


@needs_flower
def test_a_worker_that_has_kept_nothing_is_left_out():
    nodes = keep(([0.5], 1), ([0], 1), ([0.25], 1))

    def fetch(header):
        raise UserError(f"no message of round {header['round']}\x1b[31m is kept")

    mean = ask(LocalGrid(nodes | {2: fetch}))
    assert mean.lost == {2: r"no message of round 3\x1b[31m is kept"}


@needs_flower
@pytest.mark.parametrize(("stage", "number"), list(zip(STAGES, (1, 2, 3, 4), strict=True)))
def test_too_few_nodes_are_left(stage, number):
    grid = LocalGrid(keep(([0.5], 1), ([0], 1), ([0.25], 1)), [(1, stage), (2, stage)])
    with pytest.raises(UserError, match=f"1 of 3 nodes are left after stage {number} of 4, 2 are needed") as caught:
        ask(grid)
    assert "\n" not in str(caught.value)
    assert not any(node in (1, 2) and there == stage for node, there in grid.stages)


@needs_flower
def test_messages_of_zeros_have_a_mean():
    mean = ask(LocalGrid(keep(*[([0, 0], 1)] * 3)), clip=0)
    assert mean.vector.tolist() == [0, 0]


@needs_flower
def test_the_server_sees_no_message():
    """It sees numbers that are as good as even over the whole range; the same message twice looks different."""
    seen = []

    def look(node, stage, reply):
        if stage == "collect_masked_vectors" and node == 1:
            _, vector = reply.content["secaggplus_configs"]["masked_params"]
            seen.append(np.load(io.BytesIO(vector)))
            assert [list(record.values()) for record in reply.content.array_records.values()] == [[]]
        return reply

    for _ in range(2):
        grid = LocalGrid(keep(*[(np.full(ENTRIES, 1e-3), 1)] * 3))
        grid.alter = look
        ask(grid)
    first, second = (masked / secure_sum.MODULUS for masked in seen)
    assert abs(first.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert len(set(first.tolist())) > 0.99 * ENTRIES


@needs_flower
def test_keys_are_gone_after_the_last_stage():
    grid = LocalGrid(keep(*[([0.5], 1)] * 3), [(2, "unmask")])
    ask(grid)
    assert [len(grid.contexts[node].state) for node in (1, 2, 3)] == [0, 1, 0]


@needs_flower
def test_a_second_sum_begins_anew_after_one_that_failed():
    grid = LocalGrid(keep(*[([0.5], 1)] * 3))
    grid.alter = lambda node, stage, reply: refuse(reply) if stage == "share_keys" else reply
    with pytest.raises(UserError, match="0 of 3 nodes are left after stage 2"):
        ask(grid)
    grid.alter = lambda node, stage, reply: reply
    assert ask(grid).vector.tolist() == [0.5]


def refuse(reply):
    from flwr.app import Error, Message

    return Message(Error(2, "no"), reply_to=reply)


@needs_flower
@pytest.mark.parametrize("stage", STAGES)
def test_replies_that_are_none_are_one_line(stage):
    """Whatever a stranger's node answers, no traceback comes of it."""

    def spoil(node, at, reply):
        if at == stage and node == 2:
            reply.content["secaggplus_configs"].clear()
        return reply

    grid = LocalGrid(keep(*[([0.5], 1)] * 3))
    grid.alter = spoil
    with pytest.raises(UserError, match=f"the replies of stage {STAGES.index(stage) + 1} of 4 fit no sum") as caught:
        ask(grid)
    assert "\n" not in str(caught.value)


@needs_flower
@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        ("setup", {"threshold": 1}, "a threshold of 1 is not between 2 and 3"),
        ("setup", {"sample_num": 2, "share_num": 2}, "at least 3 are needed"),
        ("setup", {"share_num": 5}, "5 shares for 3 nodes"),
        ("setup", {"threshold": "2"}, "TypeError"),
        ("unmask", {"dead_nids": [1]}, "asks for both shares of a node"),
    ],
)
def test_a_node_refuses_orders_that_would_show_it(stage, change, reason):
    """From the server: too low a threshold, or both shares of one node."""
    answered = []

    class Greedy(LocalGrid):
        def _answer(self, message):
            if message.content["secaggplus_configs"]["stage"] == stage:
                message.content["secaggplus_configs"].update(change)
            return super()._answer(message)

    grid = Greedy(keep(*[([0.5], 1)] * 3))
    grid.alter = lambda node, at, reply: answered.append((at, reply)) or reply
    with pytest.raises(UserError, match=f"0 of 3 nodes are left after stage {STAGES.index(stage) + 1}"):
        ask(grid)
    replies = [reply for at, reply in answered if at == stage]
    assert len(replies) == 3
    assert all(reason in reply.error.reason for reply in replies)


@needs_flower
def test_flowers_masks_come_of_seeds_of_32_bits():
    """docs/how-to/secure-aggregation.md says so: where this fails, flwr has better ones and the page is out of date."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    folded = bytes(28) + bytes(a ^ b for a, b in zip(b"\x01\x02\x03\x04", b"\x10\x20\x30\x40", strict=True))
    seed = b"\x01\x02\x03\x04\x10\x20\x30\x40" + bytes(24)
    first, second = (pseudo_rand_gen(each, 2**32, [(5,)])[0].tolist() for each in (seed, folded))
    assert first == second


@pytest.mark.parametrize(
    ("nodes", "threshold"),
    [(2, 2), (1, 1), (0, 0.5), (3, 1), (3, 4), (4, 2), (4, 0.5), (3, 2.5), (3, 0), (3, math.nan)],
)
def test_thresholds_that_protect_nobody_are_refused(nodes, threshold):
    with pytest.raises(UserError, match=f"secure mean of {nodes} nodes"):
        count_needed(nodes, threshold)


@needs_flower
@pytest.mark.parametrize(
    "changes",
    [
        {"clip": math.nan},
        {"clip": -1},
        {"clip": math.inf},
        {"largest_weight": 0},
        {"timeout": 0},
        {"timeout": math.inf},
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_sent(changes):
    grid = LocalGrid(keep(*[([0.5], 1)] * 3))
    with pytest.raises(UserError, match=r"secure mean: .* is no "):
        ask(grid, **changes)
    assert grid.stages == []


@pytest.mark.skipif(find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_it_is_said():
    with pytest.raises(UserError, match="Flower is not installed"):
        ask_mean(None, [1, 2, 3], {}, clip=1, largest_weight=1, threshold=2, timeout=1)
    with pytest.raises(UserError, match="Flower is not installed"):
        answer_stage(None, None, secure_sum.Fetch)
