"""The secure sum: all four stages in one process, over Flower's own code.

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
from fedvlm_jax.deployment.flower.secure_sum import (
    STAGES,
    TooFewNodesError,
    answer_stage,
    ask_sum,
    count_needed,
    read_vector,
)
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.errors import UserError

needs_flower = pytest.mark.skipif(
    find_spec("flwr") is None, reason="needs the extra `flower`: pip install -e '.[flower,test]'"
)
ENTRIES = 2_000


def keep(*vectors):
    """Nodes 1, 2, … that keep a vector each."""
    kept = {node: np.asarray(vector, np.float32) for node, vector in enumerate(vectors, 1)}
    return {node: lambda header, node=node: kept[node] for node in kept}


def ask(grid, **changes):
    numbers = {"clip": 1.0, "threshold": 2, "timeout": 0.1} | changes
    return ask_sum(grid, {node: {"round": 3, "to": node} for node in grid.get_node_ids()}, **numbers)


@needs_flower
def test_a_sum_worked_out_by_hand():
    grid = LocalGrid(keep([0.5, -1], [0.25, 0.5], [0, 1]))
    found = ask(grid)
    np.testing.assert_allclose(found.vector, [0.75, 0.5], atol=1e-8)
    assert (found.vector.dtype, found.nodes, found.lost, found.messages) == (np.float32, [1, 2, 3], {}, 4)
    assert sorted(grid.stages) == sorted((node, stage) for node in (1, 2, 3) for stage in STAGES)


@needs_flower
def test_every_node_gets_its_own_header():
    seen = {}
    nodes = {node: lambda header, node=node: seen.update({node: header}) or np.zeros(1) for node in (1, 2, 3)}
    ask(LocalGrid(nodes))
    assert seen == {node: {"round": 3, "to": node} for node in (1, 2, 3)}


@needs_flower
@pytest.mark.parametrize("weights", [(11, 13), (1, 1000)])
@pytest.mark.parametrize("nodes", [3, 4, 9])
def test_the_error_of_the_mean(nodes, weights):
    """A tenth of a per mille is asked for; it is float32's own rounding, whatever the number of nodes."""
    _, error = run_sum(*make_messages(nodes, weights, ENTRIES))
    assert error < 2e-7


@needs_flower
@pytest.mark.parametrize("node", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_a_node_that_leaves(stage, node):
    """One that has sent its vector counts. In flwr alone the first two stages' losses end the round."""
    messages, weights = make_messages(3, (1, 1000), ENTRIES)
    found, error = run_sum(messages, weights, [(node, stage)])
    assert found.nodes == [1, 2, 3] if stage == "unmask" else sorted({1, 2, 3} - {node})
    assert found.lost == ({} if stage == "unmask" else {node: "no reply within 0.2 s"})
    assert error < 1e-4


@needs_flower
def test_nodes_that_leave_one_by_one():
    messages, weights = make_messages(9, (1, 1000), ENTRIES)
    found, error = run_sum(messages, weights, [(4, "setup"), (2, "share_keys"), (7, "collect_masked_vectors")])
    assert found.nodes == [1, 3, 5, 6, 8, 9]
    assert error < 1e-6


@needs_flower
def test_the_error_where_the_heaviest_node_by_far_leaves():
    """The others were rounded as small shares of its weight."""
    messages, _ = make_messages(9, (1, 1), ENTRIES)
    found, error = run_sum(messages, np.array([1] * 8 + [1000]), [(9, "collect_masked_vectors")])
    assert found.nodes == [1, 2, 3, 4, 5, 6, 7, 8]
    assert error < 1e-4


@needs_flower
def test_entries_at_the_edge_of_the_range_do_not_wrap():
    assert ask(LocalGrid(keep(*[[1, -1, 0]] * 9)), threshold=2 / 3).vector.tolist() == [9, -9, 0]


@needs_flower
@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([0, -1.001], "an entry of 1.001 is beyond 1, which the server allows: not sent"),
        ([0, math.nan], "an entry of nan is beyond 1"),
        ([[0, 0]], "an entry of 0 is beyond 1"),
    ],
)
def test_what_does_not_fit_is_not_sent(vector, reason):
    """Neither cut nor let through: the sum is that of the others."""
    found = ask(LocalGrid(keep([0.5, -1], vector, [0, 1])))
    np.testing.assert_allclose(found.vector, [0.5, 0], atol=1e-8)
    assert found.nodes == [1, 3]
    assert reason in found.lost[2]


@needs_flower
def test_a_worker_that_has_kept_nothing_is_left_out():
    nodes = keep([0.5], [0], [0.25])

    def fetch(header):
        raise UserError(f"no message of round {header['round']}\x1b[31m is kept")

    found = ask(LocalGrid(nodes | {2: fetch}))
    assert found.lost == {2: r"no message of round 3\x1b[31m is kept"}


@needs_flower
@pytest.mark.parametrize(("stage", "number"), list(zip(STAGES, (1, 2, 3, 4), strict=True)))
def test_too_few_nodes_are_left(stage, number):
    grid = LocalGrid(keep([0.5], [0], [0.25]), [(1, stage), (2, stage)])
    with pytest.raises(
        TooFewNodesError, match=f"1 of 3 nodes is left after stage {number} of 4, 2 are needed"
    ) as caught:
        ask(grid)
    assert "\n" not in str(caught.value)
    assert not any(node in (1, 2) and there == stage for node, there in grid.stages)


@needs_flower
def test_vectors_of_zeros_have_a_sum():
    found = ask(LocalGrid(keep(*[[0, 0]] * 3)), clip=0)
    assert found.vector.tolist() == [0, 0]


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
        grid = LocalGrid(keep(*[np.full(ENTRIES, 1e-3)] * 3))
        grid.alter = look
        ask(grid)
    first, second = (masked / secure_sum.MODULUS for masked in seen)
    assert abs(first.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert len(set(first.tolist())) > 0.99 * ENTRIES


@needs_flower
def test_keys_are_gone_after_the_last_stage():
    grid = LocalGrid(keep(*[[0.5]] * 3), [(2, "unmask")])
    ask(grid)
    assert [len(grid.contexts[node].state) for node in (1, 2, 3)] == [0, 1, 0]


@needs_flower
def test_a_second_sum_begins_anew_after_one_that_failed():
    grid = LocalGrid(keep(*[[0.5]] * 3))
    grid.alter = lambda node, stage, reply: refuse(reply) if stage == "share_keys" else reply
    with pytest.raises(UserError, match="0 of 3 nodes are left after stage 2"):
        ask(grid)
    grid.alter = lambda node, stage, reply: reply
    assert ask(grid).vector.tolist() == [1.5]


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

    grid = LocalGrid(keep(*[[0.5]] * 3))
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

    grid = Greedy(keep(*[[0.5]] * 3))
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
    with pytest.raises(UserError, match=f"secure sum of {nodes} nodes"):
        count_needed(nodes, threshold)


@needs_flower
@pytest.mark.parametrize(
    "changes", [{"clip": math.nan}, {"clip": -1}, {"clip": math.inf}, {"timeout": 0}, {"timeout": math.inf}]
)
def test_numbers_out_of_range_are_refused_before_anything_is_sent(changes):
    grid = LocalGrid(keep(*[[0.5]] * 3))
    with pytest.raises(UserError, match="secure sum: entries of at most"):
        ask(grid, **changes)
    assert grid.stages == []


@pytest.mark.skipif(find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_it_is_said():
    with pytest.raises(UserError, match="Flower is not installed"):
        ask_sum(None, {1: {}, 2: {}, 3: {}}, clip=1, timeout=1)
    with pytest.raises(UserError, match="Flower is not installed"):
        answer_stage(None, None, lambda header: np.zeros(1))


@pytest.mark.parametrize(
    ("packet", "reason"),
    [(Packet({"error": "the worker is not running"}), "worker is not running"), (Packet({}, b"12345"), "5 bytes")],
)
def test_answers_of_a_worker_that_are_no_vector(packet, reason):
    with pytest.raises(UserError, match=reason):
        read_vector(packet)
