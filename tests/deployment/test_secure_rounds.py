"""A deployment whose messages are summed in Flower's four stages: the server's state is that of plain messages."""

from dataclasses import replace

import numpy as np
import pytest
from deployment_world import LocalTransport, make_run, open_nodes, plan_run, write_rows
from safetensors.numpy import load_file
from secure_sum import LocalGrid

from fedvlm_jax.deployment.coordinator import coordinate
from fedvlm_jax.deployment.flower.secure_sum import ask_sum, read_vector
from fedvlm_jax.deployment.packets import Packet, SecureSum
from fedvlm_jax.utils.progress import SilentProgress

pytest.importorskip("flwr", reason="needs the extra `flower`: pip install -e '.[flower,test]'")
pytestmark = pytest.mark.slow


class StagedTransport(LocalTransport):
    """Nodes in this process; sums come of `ask_sum` and `answer_stage`, and one node leaves before it sends."""

    def __init__(self, nodes, gone=()):
        super().__init__(nodes)
        self.gone, self.sums = gone, []

    def ask_sum(self, orders, clip, timeout):
        def keep(node):
            return lambda header: read_vector(self.nodes[node - 100].answer(Packet(header)))

        grid = LocalGrid({node: keep(node) for node in orders}, self.gone)
        found = ask_sum(grid, {node: order.header for node, order in orders.items()}, clip=clip, timeout=1)
        self.sums.append(found)
        return SecureSum(found.vector, found.nodes)


def test_the_server_s_state_is_that_of_plain_messages(model, tmp_path):
    run = make_run(model, None, "emoji", method="fedsa-lora")
    run = replace(run, train=replace(run.train, rounds=1))
    rows, states = write_rows(tmp_path / "rows"), []
    for case, secure, gone in (("plain", False, ()), ("sum", True, ()), ("left", True, [(101, "setup")])):
        plan, tokens = plan_run(run, secure=secure)
        transport = StagedTransport(open_nodes(plan, tokens, rows, tmp_path / case), gone)
        folder = coordinate(plan, None, transport, tmp_path / f"server-{case}", SilentProgress())
        states.append(load_file(folder / "adapters" / "shared.safetensors"))
        assert [found.nodes for found in transport.sums] == ([[100, 101, 102]] if case == "sum" else [[100, 102]] if gone else [])  # fmt: skip # noqa: E501
    plain, summed, without = states
    for path, leaf in plain.items():
        np.testing.assert_allclose(summed[path], leaf, rtol=1e-5, atol=1e-7)
    assert any(np.abs(without[path] - leaf).max() > 1e-5 for path, leaf in plain.items())
