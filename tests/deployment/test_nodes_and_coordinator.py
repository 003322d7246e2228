"""What crosses the wire, who is let in, what is refused, and what is left when files are damaged."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from deployment_world import (
    LENGTHS,
    LocalTransport,
    SummingTransport,
    make_run,
    open_nodes,
    plan_run,
    write_rows,
)
from safetensors.numpy import load_file

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.config.run_options import LoraOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.deployment.coordinator import coordinate
from fedvlm_jax.deployment.node import open_node
from fedvlm_jax.deployment.packets import Failure, Packet
from fedvlm_jax.deployment.plan import NodeFile, make_plan, read_node_file, read_plan, write_node_file, write_plan
from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.run_dir.reader import find_client, read_finished, read_run
from fedvlm_jax.training.extend_run import lengthen
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import SilentProgress


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
    return plan_run(make_run(model, None, "emoji", method="plora"))


class Boasting(LocalTransport):
    """Carries numbers that no node has from us, whose names are those of a line's own entries, or no names at all."""

    def ask(self, orders, timeout):
        found = super().ask(orders, timeout)
        for node, reply in found.items():
            if reply.header["kind"] == "train":
                metrics = {**reply.header["metrics"], "round": 77.0, "clients": 5.0, "<b>": 1.0}
                found[node] = dataclasses.replace(reply, header={**reply.header, "metrics": metrics})
        return found


@pytest.fixture(scope="module")
def finished(planned, rows, tmp_path_factory):
    """A deployment from start to end: its folder, the nodes, what was carried, what was said."""
    folder, (plan, tokens) = tmp_path_factory.mktemp("finished"), planned
    loaded = load_model(make_run(plan.run.model, None, rows / "ann"))
    nodes, show = open_nodes(plan, tokens, rows, folder, loaded=loaded), SilentProgress()
    transport = Boasting(nodes)
    return coordinate(plan, None, transport, folder / "server", show), nodes, transport.carried, show


def test_no_personal_leaf_crosses_the_wire(finished):
    """The private factors, and every eight numbers of them, are in no packet in either direction."""
    _, nodes, carried, _ = finished
    wire = b"".join(order.payload + reply.payload for order, reply in carried)
    texts = "".join(order.header_text() + reply.header_text() for order, reply in carried)
    assert len(wire) > 10_000
    for node in nodes.values():
        for round_ in node._states.rounds():
            state = jax.tree_util.tree_leaves_with_path(node._states.load(round_))
            private = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in state}
            assert any("'own'" in path and path.endswith("['a']") for path in private)
            for path, leaf in private.items():
                content = leaf.tobytes()
                parts = [content[at : at + 32] for at in range(0, len(content) - 31, 32)]
                found = [part for part in parts if any(part) and part in wire]
                # The start is drawn by the seed: what never moved is everybody's.
                assert not found or np.array_equal(leaf, _at_start(node, path)), path
        assert node.file.token not in texts.replace(json.dumps(node.file.token), "", 1)


def _at_start(node, path):
    begun = node._programs(2).start(node._key, node._start, np.asarray([node.file.number], np.int32))
    named = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(begun)}
    return np.asarray(named[path][0])


def test_bytes_on_the_wire_are_those_that_are_counted(finished):
    folder, nodes, carried, _ = finished
    for line in read_run(folder).rounds:
        trained = [(o, r) for o, r in carried if o.header["kind"] == "train" and o.header["round"] == line["round"]]
        assert len(trained) == len(nodes)
        assert {len(reply.payload) for _, reply in trained} == {line["bytes_up_per_client"]}
        assert {len(order.payload) for order, _ in trained} == {line["bytes_down_per_client"]}
        headers = [len(packet.header_text()) for pair in trained for packet in pair]
        assert max(headers) < 1500


def test_the_server_s_folder_is_a_run_s(finished, capsys):
    from fedvlm_jax.cli.main import main

    folder, _, _, show = finished
    record = read_run(folder)
    assert [line["round"] for line in record.rounds] == [1, 2]
    assert {line["clients"] for line in record.rounds} == {3}
    assert not any("<b>" in line for line in record.rounds)
    assert record.rounds[-1]["validation"]["metric"] == record.metric
    scored = record.scores("personal", "loss")
    assert set(scored) == {"ann", "bob", "cyd"}
    assert (folder / "adapters" / "shared.safetensors").is_file()
    assert not list((folder / "adapters").glob("clients/*"))
    assert main(["report", str(folder)]) in (None, 0)
    page = (folder / "report.html").read_text()
    assert "ann" in page
    assert "cyd" in page
    assert "on the rows of 3 nodes, seed 1" in page
    assert "data.max_answer_tokens" in page
    assert "data.vendors" not in page
    assert any("ann is there" in note for note in show.notes)
    assert show.notes[-2:] == [f"run     {folder}", f"next    fedvlm report {folder}"]


@pytest.mark.parametrize(
    "words", [("ask", "--client", "ann", "what?"), ("evaluate",), ("export",), ("demo",), ("train", "--resume")]
)
def test_the_server_s_folder_has_no_models_and_says_so(finished, words, capsys):
    from fedvlm_jax.cli.main import main

    folder, _, _, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    name, *others = words
    with pytest.raises(SystemExit) as stop:
        main([name, "--resume", str(folder), "--rounds", "9"] if name == "train" else [name, str(folder), *others])
    assert stop.value.code == 2
    assert "is that of a deployment's server" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_node_s_folder_is_that_of_a_run_of_one_client(finished, capsys):
    """So its own model is asked, evaluated and exported there."""
    from fedvlm_jax.cli.main import main

    folder, nodes, _, _ = finished
    own = nodes[1].folder / "run"
    assert read_finished(own).clients == ("bob",)
    trained = [read_run(at).config["resolved"]["adapter_parameters"] for at in (folder, own)]
    assert trained[0] == trained[1] > 0
    assert find_client(None, ("bob",)) == "bob"
    with pytest.raises(UserError, match=r"is a node's, and more rounds need a new deployment"):
        lengthen(own, 9)
    assert main(["export", str(own), "--to", "peft", "--out", str(own.parent / "peft")]) in (None, 0)
    assert list((own.parent / "peft").rglob("adapter_model.safetensors"))


def test_a_server_that_is_started_again_has_nothing_to_do(finished, planned):
    folder, _, _, _ = finished
    show = SilentProgress()
    assert coordinate(planned[0], None, LocalTransport({}), folder, show) == folder
    assert show.notes == [f"{folder} is finished"]


@pytest.mark.broad
def test_a_secure_sum_gives_what_all_messages_give(model, rows, tmp_path):
    """The mean alone makes the same state."""
    run = make_run(model, None, "emoji", method="fedsa-lora")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, rounds=1))
    states = []
    for secure in (False, True):
        plan, tokens = plan_run(run, secure=secure)
        nodes = open_nodes(plan, tokens, rows, tmp_path / str(secure))
        transport = SummingTransport(nodes)
        folder = coordinate(plan, None, transport, tmp_path / f"server-{secure}", SilentProgress())
        trained = [reply for order, reply in transport.carried if order.header["kind"] == "train"]
        assert len(trained) == 3
        assert all(bool(reply.payload) != secure for reply in trained)
        states.append(load_file(folder / "adapters" / "shared.safetensors"))
    plain, summed = states
    assert plain.keys() == summed.keys()
    for path, leaf in plain.items():
        np.testing.assert_allclose(summed[path], leaf, rtol=1e-5, atol=1e-7)


class Answers:
    """A transport whose nodes answer what they are told to."""

    def __init__(self, *headers):
        self.headers = dict(enumerate(headers, 100))

    def list_nodes(self):
        return list(self.headers)

    def ask(self, orders, timeout):
        return {n: h if isinstance(h, Failure) else Packet(h) for n, h in self.headers.items() if n in orders}


def say(planned, schema, number=0, **changes):
    sizes = {"train": 3, "validation": 1, "test": 1}
    header = {"number": number, "token": planned[1][number % 3], "name": "ann", "sizes": sizes, "states": []}
    header["session"] = "5"
    return {**header, "schema": schema, **changes}


@pytest.fixture
def roll(planned):
    from fedvlm_jax.deployment.roll import Roll

    return Roll(planned[0], "schema")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token": "0" * 32}, "does not know that client's secret"),
        ({"number": 7}, "does not know that client's secret"),
        ({"number": -1}, "does not know that client's secret"),
        ({"schema": "other"}, "arrays of other shapes"),
        ({"sizes": None}, "sizes"),
        ({"states": ["a"]}, "states"),
        ({"name": 5}, "name"),
    ],
)
def test_who_is_nobody_is_left_out(planned, roll, change, reason):
    (told,) = roll.update(Answers(say(planned, "schema") | change), 1.0)
    assert reason in told
    assert not roll.nodes
    assert roll.update(Answers(say(planned, "schema") | change), 1.0) == []  # and told of once


def test_two_nodes_of_one_client_are_refused(planned, roll):
    with pytest.raises(UserError, match=r"two nodes say that they are client 0"):
        roll.update(Answers(say(planned, "schema"), say(planned, "schema", session="6")), 1.0)


def test_a_node_that_was_killed_is_listed_for_a_while_beside_the_one_in_its_place(planned, roll):
    """Its own process behind another connection, or nobody any more."""
    one = say(planned, "schema")
    roll.update(Answers(one), 1.0)
    roll.update(Answers(one, one), 1.0)
    assert roll.nodes == {0: 101}
    roll.update(Answers(one, Failure("gone"), say(planned, "schema", session="7")), 1.0)
    assert roll.nodes == {0: 102}
    assert set(roll.refused) == {100, 101}


def test_a_worker_that_is_not_started_yet_is_asked_again(planned, roll):
    assert "no worker" in roll.update(Answers(Failure("no worker")), 1.0)[0]
    roll.update(Answers(say(planned, "schema")), 1.0)
    assert roll.nodes == {0: 100}


def test_names_of_nodes_are_texts_of_strangers(planned, roll):
    texts = ["\x1b[31mred", "", "ann" * 100]
    roll.update(Answers(*(say(planned, "schema", number, name=text) for number, text in enumerate(texts))), 1.0)
    names = [roll.members[number].name for number in range(3)]
    assert names[0] == r"\x1b[31mred"
    assert names[1] == "client-1"
    assert len(names[2]) <= 101


def test_a_node_that_lost_its_state_begins_anew(planned, roll):
    roll.update(Answers(say(planned, "schema")), 1.0)
    roll.members[0].kept = roll.members[0].best = 4
    roll.update(Answers(), 1.0)
    (_, lost) = roll.update(Answers(say(planned, "schema", states=[3])), 1.0)
    assert "has lost its personal state of round 4" in lost
    assert (roll.members[0].kept, roll.members[0].best) == (0, 0)


def test_damaged_states_are_noticed(finished):
    _, nodes, _, _ = finished
    states = nodes[0]._states
    file = states._name(states.rounds()[-1])
    whole = file.read_bytes()
    try:
        for content in (whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b""):
            file.write_bytes(content)
            with pytest.raises(DamagedError, match=r"state-\d+\.bin is damaged"):
                states.load(states.rounds()[-1])
    finally:
        file.write_bytes(whole)


def test_orders_that_are_none_are_refused(finished):
    _, nodes, _, _ = finished
    plan = nodes[0].file.plan.digest
    for header, reason in [
        ({"kind": "hello"}, "another plan"),
        ({"kind": "hello", "plan": "0" * 16}, "another plan"),
        ({"kind": "shell", "plan": plan}, "'shell' is unknown"),
        ({"kind": ["train"], "plan": plan}, "is unknown"),
        ({"kind": "train", "plan": plan}, "'round' is missing"),
        ({"kind": "evaluate", "plan": plan, "round": 1, "kept": 0}, r"0 bytes came"),
        ({"kind": "message", "plan": plan, "round": 1, "weight": 1.0}, "no message of round 1"),
    ]:
        with pytest.raises(UserError, match=reason):
            nodes[0].answer(Packet(header))


def test_orders_outside_the_plan_are_refused(finished):
    """And leave every state as it was; a learning rate of 1e9 would have ended this client's model."""
    _, nodes, _, _ = finished
    node = nodes[0]
    train = {"round": 2, "kept": 1, "keep": [], "rates": find_rates(node.file.plan.run.train, 2), "steps": 2}
    train |= {"kind": "train", "plan": node.file.plan.digest, "weight": 0.5, "share": 0.5}
    before = {file: file.read_bytes() for file in node.folder.rglob("*") if file.is_file()}
    for changes in [
        *({"round": round_} for round_ in (0, -1, 3, 2**40)),
        *({"kept": kept} for kept in (-1, 2, 10**30)),
        *({"steps": steps} for steps in (0, 3, 10**12)),
        *({"rates": {"a": rate, "b": rate}} for rate in (1e9, "nan", -1.0, "inf")),
        *({name: weight} for name in ("weight", "share") for weight in (-0.5, 1.5, "nan", "inf")),
        {"kind": "evaluate", "kept": 3},
        {"kind": "finish", "round": 3},
        {"kind": "message", "weight": "nan"},
    ]:
        with pytest.raises(UserError, match="the coordinator's order is outside the plan"):
            node.answer(Packet(train | changes))
    assert {file: file.read_bytes() for file in node.folder.rglob("*") if file.is_file()} == before


def test_a_message_goes_into_one_sum_alone(finished):
    """The difference of two sums is one client's message."""
    _, nodes, _, _ = finished
    order = Packet({"kind": "message", "plan": nodes[0].file.plan.digest, "round": 2, "weight": 1.0})
    assert nodes[0].answer(order).payload
    with pytest.raises(UserError, match="no message of round 2"):
        nodes[0].answer(order)


def test_a_folder_of_another_client_is_refused_before_the_model_is_loaded(finished, planned):
    _, nodes, _, _ = finished
    file, data = NodeFile(1, planned[1][1], planned[0]), make_options("nothing-there", **LENGTHS)
    with pytest.raises(UserError, match="has the states of another client"):
        open_node(file, data, None, nodes[0].folder, SilentProgress())


def test_plans_and_node_files_come_back_as_they_were(planned, tmp_path):
    plan, tokens = planned
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json").digest == plan.digest
    assert not any(token in (tmp_path / "plan.json").read_text() for token in tokens)
    write_node_file(tmp_path / "node.json", plan, 2, tokens[2])
    assert (tmp_path / "node.json").stat().st_mode & 0o777 == 0o600
    assert read_node_file(tmp_path / "node.json").number == 2
    text = (tmp_path / "node.json").read_text()
    for changed, reason in [
        (text.replace('"number": 2', '"number": 1'), "not that of client 1"),
        (text.replace('"seed": 1', '"seed": 2'), "was it edited"),
        (text.replace(f'"version": "{plan.version}"', '"version": "9.9"'), "both sides need the same version"),
        (text[:-10], "not readable as JSON"),
        ("[]", "expected a JSON object"),
    ]:
        (tmp_path / "node.json").write_text(changed)
        with pytest.raises(UserError, match=reason):
            read_node_file(tmp_path / "node.json")


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"clients": 1}, "expected 2 to"),
        ({"cohort": 5}, {}, "only 3 clients"),
        ({}, {"least": 4}, "--at-least 4"),
        ({}, {"timeout": 0.0}, "--timeout 0"),
        ({}, {"clients": 2, "secure": True}, "a mean of two"),
        ({"cohort": 2}, {"secure": True}, "a mean of two"),
        ({"train": TrainOptions(finetune_steps=3)}, {}, "--train.finetune-steps: not in a deployment"),
    ],
)
def test_plans_that_cannot_be_are_refused(model, changes, options, reason):
    run = make_run(model, None, "emoji", method="plora", **changes)
    with pytest.raises(UserError, match=reason):
        make_plan(run, **{"clients": 3, **options})


def test_what_needs_every_message_is_not_summed_in_secret(model, tmp_path):
    plan, _ = plan_run(make_run(model, None, "emoji", method="flora"), secure=True)
    with pytest.raises(UserError, match=r"--secure: the server of flora needs every client's message"):
        coordinate(plan, None, LocalTransport({}), tmp_path / "server", SilentProgress())


def test_another_base_and_rows_of_several_clients_are_refused(model, planned, rows, tmp_path):
    plan, tokens = planned
    file = NodeFile(0, tokens[0], plan)
    with pytest.raises(UserError, match=r"has 3 clients \(ann, bob, cyd\), and a node is one"):
        open_node(file, make_options(str(rows / "all"), **LENGTHS), None, tmp_path / "node", SilentProgress())
    data = make_options(str(rows / "ann"), **LENGTHS)
    with pytest.raises(UserError, match=r"made with:\n  the weights of the model .* are others"):
        open_node(file, data, "florence2-nano", tmp_path / "node", SilentProgress())


def test_ranks_go_by_the_client_s_number(model, rows, tmp_path):
    run = make_run(model, None, "emoji", method="plora", lora=LoraOptions(rank=2, ranks=(1, 2)))
    plan, tokens = plan_run(run)
    nodes = open_nodes(plan, tokens, rows, tmp_path, numbers=(1,))
    assert int(nodes[1]._states.blank()["rank"]) == 0
    begun = nodes[1]._programs(2).start(nodes[1]._key, nodes[1]._start, np.asarray([1], np.int32))
    assert int(begun["rank"][0]) == 2
