"""A deployment in one process does what the simulator does: losses, what is shared, and every personal state."""

import jax
import numpy as np
import pytest
from deployment_world import LocalTransport, make_run, open_nodes, plan_run, write_rows
from tiny_run import StopAfter, StopError
from toy import WRITING

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.deployment.coordinator import Coordinator, coordinate
from fedvlm_jax.deployment.roll import Roll
from fedvlm_jax.deployment.server_folder import ServerFolder
from fedvlm_jax.deployment.server_program import open_server_program
from fedvlm_jax.training.experiment import make_simulator, open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import SilentProgress

LOST = ("train", 1, 2)
"""The third client's reply of the first round never arrives, though the client has trained."""


BROAD = ("fedex-lora", "fedalt", "rolora")
"""A base that moves, clients that receive different things, two phases; the others are alike
to the engine and slow tests here, and each has its view held against the server's state in methods/test_contract.py."""


def mark(name):
    return [] if name == "plora" else pytest.mark.broad if name in BROAD else pytest.mark.slow


METHODS = [pytest.param(name, marks=mark(name)) for name in WRITING]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def loaded(model, rows):
    return load_model(make_run(model, None, rows / "all"))


def simulate(run, loaded):
    """Two rounds of the simulator, of which the third client drops out of the first; its state after each."""
    experiment = open_experiment(run, loaded)
    simulator, reports = make_simulator(experiment), []
    for round_ in (1, 2):
        read = simulator.read_round(round_)
        if round_ == 1:
            counts = np.asarray([len(client.train) for client in experiment.examples.clients], np.float64)
            counts[2] = 0
            weights = np.zeros_like(read.weights)
            weights[:3] = counts / counts.sum()
            read = read._replace(weights=weights)
        reports.append(simulator.run_round(read, find_rates(run.train, round_)))
    return simulator, reports


def assert_near(got, want, start, most=1e-4):
    """Within this part of the way that each leaf went since the start; of what did not move, of its size."""
    got, want, start = (jax.tree.leaves(part) for part in (got, want, start))
    for one, other, first in zip(got, want, start, strict=True):
        one, other, first = (np.asarray(leaf, np.float64) for leaf in (one, other, first))
        scale = max(np.abs(other - first).max(initial=0), 1e-7)
        assert np.abs(one - other).max(initial=0) <= most * scale


@pytest.mark.parametrize("method", METHODS)
def test_two_rounds_with_a_lost_reply_and_restarts(method, model, loaded, rows, tmp_path):
    run = make_run(model, tmp_path / "simulated", rows / "all", method=method)
    simulator, reports = simulate(run, loaded)
    plan, tokens = plan_run(run)
    stop = StopAfter(1)
    nodes = open_nodes(plan, tokens, rows, tmp_path, loaded=loaded)
    with pytest.raises(StopError):
        coordinate(plan, None, LocalTransport(nodes, [LOST]), tmp_path / "server", stop)
    # Node and server alike begin again with what is on their disks.
    nodes, show = open_nodes(plan, tokens, rows, tmp_path, loaded=loaded), SilentProgress()
    coordinate(plan, None, LocalTransport(nodes), tmp_path / "server", show)
    lines = [*stop.lines, *show.lines]
    for line, report in zip(lines, reports, strict=True):
        counted = np.isin(report.numbers, report.counted)
        assert line["loss"] == pytest.approx(report.metrics["loss"][counted].mean(), rel=1e-5)
        for name, values in report.metrics.items():
            # A distance of two models that begin alike is rounding at first.
            assert line[name] == pytest.approx(values[counted].mean(), rel=1e-3, abs=1e-7)
    assert [line["dropped"] for line in lines] == [1, 0]
    start = simulator.programs.method.init(adapter=open_experiment(run, loaded).adapter)
    server = restore(tmp_path / "server", plan)
    assert_near(server, simulator.server, start)
    for number, node in nodes.items():
        assert node._states.rounds() in ([1, 2], [2])
        at = np.asarray([number], np.int32)
        state, begun = simulator.client_states.gather(at), simulator.programs.start(simulator.key, start, at)
        held = jax.tree.map(lambda leaf: leaf[None], node._states.load(2))
        # Moments of the optimisers are means of gradients, some of them tiny: rounding is more of them.
        assert_near(held, state, begun, most=1e-3)
        adapters = [
            simulator.programs.personalise(on, of, np.asarray([True]), at, simulator.key)
            for on, of in ((server, held), (simulator.server, state), (start, begun))
        ]
        assert_near(*adapters)


@pytest.mark.broad
def test_two_of_three_clients_are_drawn_as_the_simulator_draws_them(model, loaded, rows, tmp_path):
    run = make_run(model, tmp_path / "simulated", rows / "all", method="plora", cohort=2)
    experiment = open_experiment(run, loaded)
    simulator = make_simulator(experiment)
    reports = [simulator.run_round(simulator.read_round(n), find_rates(run.train, n)) for n in (1, 2)]
    plan, tokens = plan_run(run)
    nodes, show = open_nodes(plan, tokens, rows, tmp_path, loaded=loaded), SilentProgress()
    transport = LocalTransport(nodes)
    coordinate(plan, None, transport, tmp_path / "server", show)
    for line, report in zip(show.lines, reports, strict=True):
        trained = [
            (order.header["round"], reply.header["number"])
            for order, reply in transport.carried
            if order.header["kind"] == "train"
        ]
        assert line["clients"] == 2
        assert line["loss"] == pytest.approx(report.metrics["loss"].mean(), rel=1e-5)
        assert [number for round_, number in trained if round_ == line["round"]] == report.numbers.tolist()


def restore(folder, plan):
    """The server's state in the newest checkpoint."""
    program = open_server_program(plan, plan.run.model)
    files = ServerFolder(folder, plan)
    best = (program.start, 0, (0.0, 0.0))
    coordinator = Coordinator(plan, "", None, files, SilentProgress(), program, None, program.start, best)
    coordinator.roll = Roll(plan, "")
    coordinator._restore()
    files.checkpoints.close()
    return coordinator.server
