"""A deployment in one process does what the simulator does: losses, what is shared, and every personal state."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from deployment_world import LocalTransport, make_run, open_nodes, plan_run, write_rows
from tiny_run import StopAfter, StopError
from toy import WRITING

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.config.run_options import LoraOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.deployment.coordinator import Coordinator, coordinate
from fedvlm_jax.deployment.node import open_node
from fedvlm_jax.deployment.plan import NodeFile
from fedvlm_jax.deployment.roll import Roll
from fedvlm_jax.deployment.server_folder import ServerFolder
from fedvlm_jax.deployment.server_program import open_server_program
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.zoo import pfedmoap
from fedvlm_jax.run_dir.validated_files import read_results
from fedvlm_jax.training.evaluate import evaluate
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
    compare_with_simulator(run, run, loaded, rows, tmp_path)


SGD = TrainOptions(rounds=2, local_steps=2, batch_size=2, optimizer="sgd", learning_rate_a=1.0, learning_rate_b=1.0)
CHOOSING = {
    "plora": {"train": SGD}, "promptfl": {}, "fedpgp": {}, "fedotp": {}, "pfedmma": {"lora": LoraOptions(rank=2)},
    "pfedmoap": {"method_options": pfedmoap.Options(gate_heads=4), "train": SGD},
}  # fmt: skip
"""Methods on a CLIP, with what they need there; plora stands for those of low-rank factors. In pfedmoap experts are
nearly alike at first, and so is A of plora while its B is tiny: gradients are rounding, of which AdamW would make full
steps."""
CHOSEN = {"pfedmoap": [], "plora": pytest.mark.broad, "fedpgp": pytest.mark.broad}


@pytest.fixture(scope="module")
def loaded_clip(clip, rows):
    return load_model(make_run(clip, None, rows / "all"))


@pytest.mark.parametrize("method", [pytest.param(name, marks=CHOSEN.get(name, pytest.mark.slow)) for name in CHOOSING])
def test_nodes_that_agree_on_classes_do_what_the_simulator_does_with_those_that_it_finds(
    method, clip, loaded_clip, rows, tmp_path
):
    given = {"lora": LoraOptions(), "objective": "classify", **CHOOSING[method]}
    run = make_run(clip, tmp_path / "simulated", rows / "all", method=method, **given)
    stored = [json.loads(line) for line in (rows / "all" / "rows.jsonl").read_text().splitlines()]
    trained = {row["chosen"] for row in stored if row["split"] == "train"}
    novel = {row["chosen"] for row in stored} - trained
    assert novel
    assert {row["chosen"] for row in stored if row["client"] == "ann"} < trained | novel
    # In another order than the model has them in.
    agreed = {"agreed_classes": (*sorted(trained, reverse=True),), "agreed_novel": (*sorted(novel, reverse=True),)}
    planned = replace(run, data=run.data.replace(**agreed))
    compare_with_simulator(run, planned, loaded_clip, rows, tmp_path)
    # The bare base is asked about all classes everywhere, and nodes know which of them others train on.
    found = read_results(tmp_path / "server" / "results.json")
    asked = open_experiment(run, loaded_clip).evaluator(loaded_clip.params, {"bare": None}, "test", range(3))["bare"]
    for metric in ("loss", "exact_match", "exact_match_base", "exact_match_novel", "exact_match_own"):
        wanted = asked.scores[metric]
        assert wanted
        assert found["zero_shot"]["test"][metric] == {name: pytest.approx(value) for name, value in wanted.items()}
    # So does the folder that is left at a node, which has few of them among its rows.
    again = evaluate(tmp_path / "node-0" / "run")["personal"]["test"]["loss"]
    assert again == {"ann": pytest.approx(found["personal"]["test"]["loss"]["ann"], rel=1e-5)}


def test_a_node_with_an_answer_that_is_no_class_does_not_start(clip, loaded_clip, rows, tmp_path):
    run = make_run(clip, None, rows / "all", method="promptfl", lora=LoraOptions())
    plan, tokens = plan_run(run)
    with pytest.raises(UserError, match="no node knows the others': agree on them beforehand"):
        open_nodes(plan, tokens, rows, tmp_path, [0], loaded_clip)
    plan, tokens = plan_run(replace(run, data=run.data.replace(agreed_classes=("cat", "dog"))))
    with pytest.raises(UserError, match=r"ann have the answer '.*', which is none of the classes agreed on"):
        open_nodes(plan, tokens, rows, tmp_path, [0], loaded_clip)
    file, data = NodeFile(0, tokens[0], plan), make_options(str(rows / "ann"), novel_classes=0.3)
    with pytest.raises(UserError, match="the plan says which classes are novel"):
        open_node(file, data, None, tmp_path / "node-0", SilentProgress(), loaded_clip)
    assert list(tmp_path.iterdir()) == []


def compare_with_simulator(run, planned, loaded, rows, tmp_path):
    """Two rounds of a run in the simulator and of a plan with nodes, of which one reply is lost; both begin again."""
    simulator, reports = simulate(run, loaded)
    plan, tokens = plan_run(planned)
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
            least = 1e-7 if name == "distillation" else 0
            assert line[name] == pytest.approx(values[counted].mean(), rel=1e-3, abs=least)
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
