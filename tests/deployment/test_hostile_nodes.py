"""Nodes that lie, break or stay silent, and coordinators that end at any moment: what is left is as if they had not."""

import math
import os
import shutil
import stat
from dataclasses import replace

import jax
import numpy as np
import pytest
from deployment_world import make_run, plan_run

from fedvlm_jax.deployment import coordinator
from fedvlm_jax.deployment.coordinator import Coordinator, coordinate
from fedvlm_jax.deployment.node_states import NodeStates
from fedvlm_jax.deployment.packets import Failure, Packet
from fedvlm_jax.deployment.replies import TRAINED, check_replies, mean_by_name
from fedvlm_jax.deployment.server_program import open_server_program
from fedvlm_jax.deployment.vectors import digest_schema, pack
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.utils.progress import SilentProgress

NAMES = ("ann", "bob", "cyd")
SIZES = {"train": 4, "validation": 1, "test": 1}


@pytest.fixture(scope="module")
def planned(model):
    run = make_run(model, None, "emoji", method="fedsa-lora")
    run = replace(run, train=replace(run.train, rounds=4), evaluation=replace(run.evaluation, every=1))
    plan, tokens = plan_run(run)
    plan = replace(plan, timeout=0.5)
    return plan, tokens, open_server_program(plan, plan.run.model)


class Puppet:
    """A node without a model: its state is the list of rounds that it has gone through, as digits of a number."""

    def __init__(self, planned, number, folder, **changes):
        self.plan, tokens, self.program = planned
        self.number, self.token, self.changes = number, tokens[number], changes
        self.states = NodeStates(folder / f"node-{number}", {"seen": np.zeros((), np.int32)})
        self.refuses = False

    def answer(self, order):
        header = order.header
        if self.refuses:
            return Failure("worker is not running")
        message = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.program.message(0))
        payload, kind = b"", header["kind"]
        if kind == "hello":
            said = {
                "token": self.token,
                "session": "5",
                "name": NAMES[self.number],
                "sizes": SIZES,
                "states": self.states.rounds(),
            }
            said["schema"] = digest_schema(self.program.received)
        if kind == "train":
            kept, round_ = header["kept"], header["round"]
            seen = self.states.load(kept)["seen"] if kept else 0
            self.states.save(round_, {"seen": np.int32(10 * seen + round_)}, [kept, *header["keep"]])
            said = {"round": round_, "finite": True, "metrics": {"loss": 1.0}, "schema": digest_schema(message)}
            said, payload = {**said, "largest": 0.0}, b"" if self.plan.secure else pack(message)
        if kind == "evaluate":
            said = {"round": header["round"], "scores": {"loss": 1.0 / header["round"], "exact_match": 0.5}}
            said["scores"] |= {"token_f1": 0.5}
        if kind == "finish":
            own = {"test": {"loss": 0.5, "exact_match": 0.5, "token_f1": 0.5}}
            said = {"results": {"zero_shot": own, "personal": own}, "gains": {}, "generation": {"num_beams": 1}}
        reply = Packet({"kind": kind, "number": self.number, **said}, payload)
        change = self.changes.get(kind, lambda packet: packet)
        return change(reply)


class Strings:
    """The transport of puppets; `cut` may end the coordinator before or after an order is carried."""

    def __init__(self, puppets, cut=lambda kind, round_, when: None):
        self.puppets, self.cut = puppets, cut

    def list_nodes(self):
        return [100 + puppet.number for puppet in self.puppets]

    def ask(self, orders, timeout):
        about = next((order.header for order in orders.values()), {})
        self.cut(about.get("kind"), about.get("round"), "before")
        by_node = {100 + puppet.number: puppet for puppet in self.puppets}
        found = {}
        for node, order in orders.items():
            try:
                found[node] = by_node[node].answer(Packet.from_text(order.header_text(), order.payload))
            except UserError as error:
                found[node] = Failure(str(error))
        self.cut(about.get("kind"), about.get("round"), "after")
        return {
            node: Packet.from_text(reply.header_text(), reply.payload) if isinstance(reply, Packet) else reply
            for node, reply in found.items()
            if reply is not None
        }

    def ask_sum(self, orders, clip, timeout):
        raise UserError("secure sum: the replies of stage 3 of 4 fit no sum")


@pytest.fixture
def quick(planned, monkeypatch):
    """One compiled server for all; who counted in which round, in the end."""
    counted, aggregate = {}, Coordinator._aggregate
    monkeypatch.setattr(coordinator, "open_server_program", lambda plan, name: planned[2])
    monkeypatch.setattr(coordinator, "POLL", 0.01)

    def note(self, trained, numbers, round_):
        counted[round_], health = aggregate(self, trained, numbers, round_)
        return counted[round_], health

    monkeypatch.setattr(Coordinator, "_aggregate", note)
    return counted


def drive(planned, transport, folder, show=None):
    show = show or SilentProgress()
    coordinate(planned[0], None, transport, folder / "server", show)
    return show


def edit(**changes):
    return lambda packet: replace(packet, header={**packet.header, **changes})


def garble(packet):
    return replace(packet, payload=b"\xff" * len(packet.payload))


HOSTILE = [  # by round
    ("train", edit(metrics={"loss": "nan", "update_norm": "inf"})),
    ("train", edit(metrics={"loss": 10**308, "update_norm": 10**300})),
    ("train", edit(metrics={"loss": 1.0, "unfit": 3.0, "validation": 2.0, "method": 1.0, "seconds": -1.0})),
    ("train", edit(metrics={f"n{at}": 1.0 for at in range(5000)})),
    ("train", edit(schema="0" * 16)),
    ("train", edit(largest="nan")),
    ("train", edit(round=1)),
    ("train", edit(number=0)),
    ("train", lambda packet: replace(packet, payload=b"")),
    ("train", garble),
    ("train", lambda _: Packet({"kind": []})),
    ("evaluate", edit(scores={"loss": "nan", "exact_match": "inf", "token_f1": "-inf"})),
    ("evaluate", edit(scores={"loss": 10**308, "exact_match": -(10**308)})),
    ("evaluate", edit(scores={"before_redistribution": 1.0, "after_redistribution": 1.0, "metric": 1.0})),
    ("evaluate", edit(scores={f"n{at}": 1.0 for at in range(5000)})),
    ("evaluate", edit(round=1)),
    ("evaluate", edit(number=0)),
    ("evaluate", lambda _: Packet({"kind": []})),
]
ODD = {"test": {"loss": "nan", "exact_match": 10**308, **{f"n{at}": None for at in range(5000)}}, "odd": {"x": 1.0}}


@pytest.mark.broad
def test_a_hostile_node_costs_nobody_else_anything(planned, quick, tmp_path):
    from fedvlm_jax.cli.main import main

    plan = planned[0]
    plan = replace(plan, run=replace(plan.run, train=replace(plan.run.train, rounds=len(HOSTILE))))
    planned = (plan, *planned[1:])

    def lie(packet):
        kind, change = HOSTILE[packet.header["round"] - 1]
        return change(packet) if kind == packet.header["kind"] else packet

    gains = {"loss": ["inf", "nan"], **{f"n{at}": [1.0] * at for at in range(100)}}
    end = edit(results=dict.fromkeys(("zero_shot", "personal"), ODD), gains=gains, generation={"num_beams": 10**400})
    puppets = [Puppet(planned, number, tmp_path) for number in range(2)]
    puppets.append(Puppet(planned, 2, tmp_path, train=lie, evaluate=lie, finish=end))
    drive(planned, Strings(puppets), tmp_path)
    record = read_run(tmp_path / "server")  # every file has the form that its readers count on
    assert len(record.rounds) == len(HOSTILE)
    assert all({0, 1} <= set(counted) for counted in quick.values())
    assert [round_ for round_, counted in quick.items() if 2 not in counted] == [5, 6, 7, 8, 9, 10, 11]
    assert all(line["loss"] == 1.0 for line in record.rounds)
    assert all(math.isfinite(line["validation"]["loss"]) for line in record.rounds)
    assert record.results["selected_round"] == len(HOSTILE)  # by the loss of the two others
    assert {"ann", "bob"} <= set(record.scores("personal", "loss"))
    assert main(["report", str(tmp_path / "server")]) in (None, 0)


@pytest.mark.parametrize(
    "change",
    [{"token": "\ud800"}, {"number": 10**30}, {"sizes": {**SIZES, "train": 10**30}}, {"sizes": {**SIZES, "test": -1}}],
)
def test_what_no_client_says_of_itself_is_refused(change, planned, quick, tmp_path):
    """Half a character had ended the coordinator, and sizes without end its arithmetic."""
    from fedvlm_jax.deployment.roll import Roll

    roll = Roll(planned[0], digest_schema(planned[2].received))
    (told,) = roll.update(Strings([Puppet(planned, 0, tmp_path, hello=edit(**change))]), 1.0)
    assert told.startswith("a node is left out")
    assert len(told) < 400
    assert not roll.nodes


def test_no_client_takes_another_s_spare_name(planned, tmp_path):
    """Results are by name: of two of one name, one client's would have stood for both."""
    from fedvlm_jax.deployment.roll import Roll

    roll = Roll(planned[0], digest_schema(planned[2].received))
    roll.update(Strings([Puppet(planned, 0, tmp_path, hello=edit(name="client-1"))]), 1.0)
    roll.update(Strings([Puppet(planned, n, tmp_path, hello=edit(name="")) for n in (0, 1)]), 1.0)
    assert sorted(member.name for member in roll.members.values()) == ["client-0", "client-1"]


def test_a_silent_node_is_waited_for_less_and_less(planned, tmp_path, monkeypatch):
    """It had cost every round the time that an order may take."""
    from fedvlm_jax.deployment import roll as rolls

    now, asked = [0.0], []
    monkeypatch.setattr(rolls.time, "monotonic", lambda: now[0])

    class Silent(Strings):
        def ask(self, orders, timeout):
            asked.append(timeout)
            now[0] += timeout
            return {}

    roll = rolls.Roll(planned[0], "")
    while now[0] < 3600:
        roll.update(Silent([Puppet(planned, 0, tmp_path)]), 7200.0)
        now[0] += 1
    assert set(asked) == {60.0}
    assert 4 <= len(asked) <= 6


def test_what_is_always_the_same_is_told_once(planned, tmp_path):
    from fedvlm_jax.deployment.roll import Roll

    roll, puppet = Roll(planned[0], digest_schema(planned[2].received)), Puppet(planned, 0, tmp_path)
    puppet.refuses = True
    told = [roll.update(Strings([puppet]), 1.0) for _ in range(3)]
    assert list(map(len, told)) == [1, 0, 0]
    puppet.refuses = False
    assert "ann is there" in roll.update(Strings([puppet]), 1.0)[0]


def test_a_worker_that_lost_its_state_begins_anew_though_its_supernode_stayed(planned, quick, tmp_path):
    """Nobody asked it again who it is: it was left out of all rounds, whatever its message said to do."""
    puppets = [Puppet(planned, number, tmp_path) for number in range(3)]

    def cut(kind, round_, when):
        if (kind, round_, when) == ("train", 2, "before"):
            for file in (tmp_path / "node-2").glob("state-*"):
                file.unlink()

    show = drive(planned, Strings(puppets, cut), tmp_path)
    assert any("cyd has lost its personal state of round 1" in note for note in show.notes)
    assert quick[2] == [0, 1]
    assert quick[3] == [0, 1, 2]


class EndError(Exception):
    """Stands in for what ends a coordinator."""


MOMENTS = [  # and whether its newest checkpoint is damaged
    (("train", 3, "after"), True),
    (("evaluate", 3, "after"), True),
    (("finish", 4, "after"), True),
    (("line", 3, ""), True),
    (("save", 2, ""), False),
]


@pytest.mark.broad
@pytest.mark.parametrize(("moment", "lost"), MOMENTS, ids=str)
def test_a_coordinator_that_ends_at_any_moment(moment, lost, planned, quick, tmp_path, monkeypatch):
    """Each client's state is that of the rounds in which it counted, though what a round left may be run again."""
    puppets = [Puppet(planned, number, tmp_path) for number in range(3)]
    ended, late = [], {"train": lambda packet: None if packet.header["round"] == 2 else packet}
    puppets[2].changes = late  # its reply of the second round is lost

    def cut(*at):
        if at == moment and not ended:
            ended.append(at)
            raise EndError

    save, append = coordinator.ServerFolder.save, coordinator.metrics_lines.append

    def save_or_end(self, round_, *given):
        cut("save", round_, "")
        return save(self, round_, *given)

    def append_or_end(folder, line):
        cut("line", line["round"], "")
        return append(folder, line)

    monkeypatch.setattr(coordinator.ServerFolder, "save", save_or_end)
    monkeypatch.setattr(coordinator.metrics_lines, "append", append_or_end)
    with pytest.raises(EndError):
        drive(planned, Strings(puppets, cut), tmp_path)
    if lost:
        newest = max((tmp_path / "server" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        if int(newest.name) > 1:
            shutil.rmtree(newest / "state")
    puppets[2].changes = {} if moment[1] > 3 else late
    show = drive(planned, Strings(puppets), tmp_path)
    assert not any("lost its personal state" in note for note in show.notes)
    assert [line["round"] for line in read_run(tmp_path / "server").rounds] == [1, 2, 3, 4]
    for puppet in puppets:
        counted = [round_ for round_ in sorted(quick) if puppet.number in quick[round_]]
        assert 4 in counted
        assert int(puppet.states.load(4)["seen"]) == int("".join(map(str, counted)))


@pytest.mark.broad
def test_a_coordinator_in_a_new_folder_deletes_no_later_state(planned, quick, tmp_path):
    puppets = [Puppet(planned, number, tmp_path) for number in range(3)]
    drive(planned, Strings(puppets), tmp_path)

    def cut(kind, round_, when):
        if (kind, round_, when) == ("train", 2, "after"):
            raise EndError

    with pytest.raises(EndError):
        drive(planned, Strings(puppets, cut), tmp_path / "other")
    assert puppets[0].states.rounds()[-1] == 4
    assert int(puppets[0].states.load(4)["seen"]) == 1234


@pytest.mark.broad
def test_a_node_that_is_gone_for_good_does_not_end_a_run_that_is_started_again(planned, quick, tmp_path):
    puppets = [Puppet(planned, number, tmp_path) for number in range(3)]

    def cut(kind, round_, when):
        if (kind, round_, when) == ("train", 3, "before"):
            raise EndError

    with pytest.raises(EndError):
        drive(planned, Strings(puppets, cut), tmp_path)
    show = drive(planned, Strings(puppets[:2]), tmp_path)
    assert any("cyd did not come" in note for note in show.notes)
    assert quick[4] == [0, 1]


def test_a_round_that_nobody_scores_is_not_the_best(planned, quick, tmp_path):
    """It had taken the best round's place, because nobody having validation data looked the same."""
    mute = {"evaluate": lambda packet: None if packet.header["round"] == 4 else packet}
    drive(planned, Strings([Puppet(planned, number, tmp_path, **mute) for number in range(3)]), tmp_path)
    assert read_run(tmp_path / "server").results["selected_round"] == 3


def test_too_few_clients_that_can_train_are_told_of_before_the_first_round(planned, quick, tmp_path):
    """Every round had changed nothing, to the end."""
    plan = replace(planned[0], least=3)
    nobody = {"hello": edit(sizes={**SIZES, "train": 0})}
    puppets = [Puppet((plan, *planned[1:]), n, tmp_path, **(nobody if n == 2 else {})) for n in range(3)]
    with pytest.raises(UserError, match=r"2 clients have training examples, and a round needs 3"):
        drive((plan, *planned[1:]), Strings(puppets), tmp_path)


def test_a_secret_sum_that_one_node_spoils_ends_nothing(planned, quick, tmp_path):
    plan = replace(planned[0], secure=True)
    secret = (plan, *planned[1:])
    show = drive(secret, Strings([Puppet(secret, number, tmp_path) for number in range(3)]), tmp_path)
    assert sum("fit no sum: the round changes nothing" in note for note in show.notes) == 4


def test_numbers_of_replies_are_numbers():
    says = {"round": 1, "finite": True, "metrics": {"loss": "inf"}, "schema": "", "largest": 10**300}
    headers, faults = check_replies({0: Packet(says), 1: Packet({**says, "largest": 10**400})}, TRAINED)
    assert headers[0]["metrics"] == {"loss": math.inf}
    assert isinstance(headers[0]["largest"], float)
    assert "largest" in faults[1]
    assert mean_by_name([{"loss": math.inf}, {"loss": -math.inf}]).keys() == {"loss"}


def test_states_are_one_client_s_of_one_deployment(tmp_path):
    """Another client's folder, given by mistake, had been trained on."""
    shapes = {"x": np.zeros(2, np.float32)}
    states = NodeStates(tmp_path / "states", shapes, "client 0")
    states.save(1, shapes, [])
    (tmp_path / "states" / "state-2.bin.0123.tmp").write_bytes(b"half")  # of a kill
    assert NodeStates(tmp_path / "states", shapes, "client 0").rounds() == [1]
    assert not list((tmp_path / "states").glob("*.tmp"))
    with pytest.raises(UserError, match=r"has the states of another client"):
        NodeStates(tmp_path / "states", shapes, "client 1")


def test_a_state_s_name_is_on_the_disk_when_a_reply_says_so(tmp_path, monkeypatch):
    """After a power cut a state had its content and no name."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(stat.S_ISDIR(os.fstat(file).st_mode)))
    states = NodeStates(tmp_path / "states", {"x": np.zeros(2, np.float32)})
    synced.clear()
    states.save(1, {"x": np.zeros(2, np.float32)}, [])
    assert synced == [False, True]


def test_a_message_that_is_summed_in_secret_is_handed_to_nobody_who_asks(monkeypatch):
    """One plain order had shown it."""
    from fedvlm_jax.deployment.flower import client_app

    monkeypatch.setattr(client_app, "read_record", lambda content: content)
    order = Packet({"kind": "message", "round": 1, "weight": 1.0})
    assert "into a secure sum alone" in client_app.pass_on(order, {"socket": "/nowhere"}, 1.0).header["error"]


class Coming(Strings):
    """The transport of puppets of which one is listed at some times alone."""

    def __init__(self, puppets, number, is_there):
        super().__init__(puppets)
        self.number, self.is_there, self.looked = number, is_there, 0

    def list_nodes(self):
        self.looked += 1
        return [node for node in super().list_nodes() if node != 100 + self.number or self.is_there(self)]


def test_the_end_waits_for_a_node_that_connects_again(planned, quick, tmp_path, monkeypatch):
    """It had gone on with --at-least nodes, and the last evaluation had come a second before this one."""
    puppets, ending = [Puppet(planned, number, tmp_path) for number in range(3)], []
    gather = Coordinator._gather

    def note(self, wanted, when, *more, **options):
        if when == "for the last evaluation":
            ending.append(transport.looked)
        gather(self, wanted, when, *more, **options)

    monkeypatch.setattr(Coordinator, "_gather", note)
    transport = Coming(puppets, 2, lambda self: not ending or self.looked > ending[0] + 3)
    show = drive(planned, transport, tmp_path)
    record = read_run(tmp_path / "server")
    assert set(record.scores("personal", "loss")) == set(NAMES)
    assert "away" not in record.results
    assert "waiting for cyd for the last evaluation" in show.notes


def test_a_node_that_comes_after_the_end_gets_its_model_from_the_same_command(planned, quick, tmp_path):
    puppets, asked = [Puppet(planned, number, tmp_path) for number in range(3)], []
    there = [True]

    def cut(kind, round_, when):
        if kind == "evaluate" and round_ == 4:
            there[0] = False

    transport = Coming(puppets, 2, lambda self: there[0])
    transport.cut = cut
    show = drive(planned, transport, tmp_path)
    assert any("cyd did not come within 0.5 seconds for the last evaluation" in note for note in show.notes)
    assert any("cyd did not get the final model: when the node is there, give" in note for note in show.notes)
    before = read_run(tmp_path / "server")
    assert before.results["away"] == ["cyd"]
    assert set(before.scores("personal", "loss")) == {"ann", "bob"}
    shared = (tmp_path / "server" / "adapters" / "shared.safetensors").read_bytes()
    drive(planned, transport, tmp_path)  # still away: nothing changes
    assert read_run(tmp_path / "server").results == before.results
    there[0] = True
    puppets[2].changes = {"finish": lambda packet: asked.append(packet) or packet}
    puppets[0].changes = puppets[1].changes = {"finish": lambda packet: pytest.fail("asked twice")}
    transport.cut = lambda *at: None
    show = drive(planned, transport, tmp_path)
    after = read_run(tmp_path / "server")
    assert len(asked) == 1
    assert set(after.scores("personal", "loss")) == set(NAMES)
    assert after.results["away"] == []
    assert after.results["selected_round"] == before.results["selected_round"] == 4
    assert (tmp_path / "server" / "adapters" / "shared.safetensors").read_bytes() == shared
    assert show.notes[-1] == f"{tmp_path / 'server'} is finished"


BY_ROUND = {  # of each client: exact matches in rounds 1 to 4; None: no answer
    # Means over whoever is there would choose round 3, in which cyd, whose rows are hard, was away.
    "one is away": ([0.6, 0.6, 0.6, 0.6], [0.6, 0.6, 0.5, 0.5], [0.0, 0.1, None, 0.0], 2),
    "and better on those that are there": ([0.6, 0.6, 0.7, 0.6], [0.6, 0.6, 0.6, 0.6], [0.0, 0.1, None, 0.9], 3),
    "nobody in both": ([0.6, None, None, None], [0.6, None, None, None], [None, 0.9, 0.9, 0.9], 1),
}


@pytest.mark.parametrize("case", BY_ROUND)
def test_rounds_are_compared_on_the_clients_that_are_scored_in_both(case, planned, quick, tmp_path):
    *values, best = BY_ROUND[case]

    def say(value):
        def change(packet):
            exact = value[packet.header["round"] - 1]
            scores = {"loss": 1.0, "exact_match": exact, "token_f1": exact}
            return None if exact is None else replace(packet, header={**packet.header, "scores": scores})

        return change

    puppets = [Puppet(planned, number, tmp_path, evaluate=say(value)) for number, value in enumerate(values)]
    show = drive(planned, Strings(puppets), tmp_path)
    assert read_run(tmp_path / "server").results["selected_round"] == best
    told = [note for note in show.notes if note.startswith("round") and "compared" in note]
    if case == "nobody in both":
        assert told == [f"round {at} cannot be compared with round 1: no client is scored in both" for at in (2, 3, 4)]
    else:
        assert "round 3 is compared with round 2 by the scores of ann, bob: others lack one" in told
