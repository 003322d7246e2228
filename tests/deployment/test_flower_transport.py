"""Packets over Flower's Grid, with a grid of our own: by stand-ins for flwr's classes, and by flwr's where it is."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fedvlm_jax.deployment.flower import library, transport
from fedvlm_jax.deployment.flower.client_app import make_client_app, pass_on
from fedvlm_jax.deployment.flower.records import read_record, write_record
from fedvlm_jax.deployment.flower.server_app import run_plan
from fedvlm_jax.deployment.flower.transport import GRACE, GridTransport
from fedvlm_jax.deployment.packets import Failure, Packet
from fedvlm_jax.errors import UserError


class Codes:
    MESSAGE_UNAVAILABLE, REPLY_MESSAGE_UNAVAILABLE, NODE_UNAVAILABLE, CLIENT_APP_CRASHED = 3, 4, 5, 8


class FakeMessage:
    """What `flwr.app.Message` is to us."""

    def __init__(self, content, dst_node_id=None, message_type=None, ttl=None, reply_to=None):
        self.content = content
        self.metadata = SimpleNamespace(dst_node_id=dst_node_id, message_type=message_type, ttl=ttl)
        if reply_to is not None:
            self.metadata.reply_to_message_id = reply_to.metadata.message_id


class FakeClientApp:
    def query(self):
        def note(function):
            self.function = function
            return function

        return note

    def train(self):
        return lambda function: function

    def __call__(self, message, context):
        return self.function(message, context)


FAKES = {
    "flwr.app": {
        "RecordDict": dict, "ConfigRecord": dict, "ArrayRecord": dict, "Array": SimpleNamespace, "Message": FakeMessage,
    },
    "flwr.common.constant": {"ErrorCode": Codes},
    "flwr.clientapp": {"ClientApp": FakeClientApp},
}  # fmt: skip


@pytest.fixture(params=["fake", "flwr"])
def flower(request, monkeypatch):
    """Flower's classes."""
    if request.param == "flwr":
        if find_spec("flwr") is None:
            pytest.skip("flwr is not installed")
        identity = import_module("flwr.supercore.task_identity").TaskIdentity
        for name in ("_task_id", "_run_id", "_node_id"):  # which Flower gives a process of its own
            monkeypatch.setattr(identity, name, 1)
        return
    for name, content in FAKES.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flwr", ModuleType("flwr"))
    monkeypatch.setitem(sys.modules, "flwr.common", ModuleType("flwr.common"))


class Grid:
    """A Grid whose nodes are functions: of a packet and the number of looks, a reply, an error, nothing."""

    def __init__(self, nodes, most=10**9):
        self.nodes, self.most, self.sent, self.looks = nodes, most, {}, 0

    def get_node_ids(self):
        return iter(self.nodes)

    def push_messages(self, messages):
        messages = list(messages)
        if any(len(read_record(message.content).payload) > self.most for message in messages):
            return []
        ids = []
        for message in messages:
            known = message.metadata.dst_node_id in self.nodes
            ids.append(f"m{len(self.sent)}" if known else None)
            if known:
                self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, ids):
        self.looks += 1
        for name in ids:
            message = self.sent[name]
            made = self.nodes[message.metadata.dst_node_id](read_record(message.content), self.looks)
            if made is None:
                continue
            failed = isinstance(made, SimpleNamespace)
            content = None if failed else write_record(made) if isinstance(made, Packet) else made
            yield SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=name, src_node_id=1),  # an error's is the SuperLink's
                has_error=lambda failed=failed: failed, error=made if failed else None, content=content,
            )  # fmt: skip


def echo(packet, looks):
    return Packet({"of": packet.header["n"]}, packet.payload[::-1])


def error(code, reason="no\nluck"):
    return lambda packet, looks: SimpleNamespace(code=code, reason=reason)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transport, "PAUSES", (0.001, 0.002))


def test_a_packet_is_one_array_of_bytes_beside_its_header(flower):
    packet = Packet({"kind": "x", "ä": [1, None]}, bytes(range(256)))
    record = write_record(packet)
    array = record["payload"]["payload"]
    assert (array.dtype, tuple(array.shape), array.data) == ("uint8", (256,), packet.payload)
    assert read_record(record) == packet
    assert "payload" not in write_record(Packet({"kind": "x"}))
    assert read_record(write_record(Packet({"kind": "x"}))) == Packet({"kind": "x"})


def test_every_node_is_asked_and_answers(flower):
    grid = Grid({7: echo, 2**63 + 5: echo, 3: lambda packet, looks: echo(packet, looks) if looks > 3 else None})
    carried = GridTransport(grid)
    assert carried.list_nodes() == [3, 7, 2**63 + 5]
    orders = {number: Packet({"n": number}, bytes([1, number % 7])) for number in carried.list_nodes()}
    assert carried.ask(orders, 5) == {
        number: Packet({"of": number}, bytes([number % 7, 1])) for number in (3, 7, 2**63 + 5)
    }
    assert {message.metadata.message_type for message in grid.sent.values()} == {"query"}
    assert {message.metadata.ttl for message in grid.sent.values()} == {5 + GRACE}
    assert carried.ask({}, 5) == {}


def test_what_fails_is_a_failure_and_who_left_or_is_late_is_missing(flower):
    nodes = {
        1: echo,
        2: lambda packet, looks: None,
        3: error(Codes.NODE_UNAVAILABLE),
        4: error(Codes.MESSAGE_UNAVAILABLE),
        5: error(Codes.REPLY_MESSAGE_UNAVAILABLE),
        6: error(Codes.CLIENT_APP_CRASHED),
        7: lambda packet, looks: Packet({"error": "worker is\x1b[31m not running\n" + "x" * 999}),
        8: lambda packet, looks: {},
        9: lambda packet, looks: {"packet": {"header": "[1]"}},
    }
    replies = GridTransport(Grid(nodes)).ask({number: Packet({"n": number}) for number in (*nodes, 10)}, 0.05)
    assert sorted(replies) == [1, 6, 7, 8, 9]
    assert replies[1] == Packet({"of": 1})
    assert replies[6] == Failure("Flower: no luck")
    reason = replies[7].reason
    assert reason.startswith(r"worker is\x1b[31m not running x")
    assert len(reason) <= 301
    assert "holds no packet" in replies[8].reason
    assert "is no JSON object" in replies[9].reason


def test_an_order_that_is_too_large_is_told(flower):
    with pytest.raises(UserError, match="larger than Flower carries"):
        GridTransport(Grid({1: echo}, most=3)).ask({1: Packet({"n": 1}, b"1234")}, 1)


# --- The ClientApp ---


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "does not say where its worker is: --node-config 'socket=\"PATH\"'"),
        ({"socket": 3}, "does not say where its worker is"),
        ({"socket": "/nowhere/w.sock"}, "worker is not running: start `fedvlm node`"),
        ({"socket": "/" + "x" * 200}, "at most 103 bytes"),
    ],
)
def test_without_a_worker_the_reply_says_so(flower, config, told):
    reply = pass_on(write_record(Packet({"kind": "x"})), config, 1.0)
    assert told in reply.header["error"]
    assert reply.payload == b""


def test_the_app_hands_the_order_to_the_worker(flower, request, monkeypatch):
    asked = []

    def ask(path, packet, timeout):
        asked.append((str(path), packet, timeout))
        return Packet({"kind": "reply"}, b"34")

    monkeypatch.setattr("fedvlm_jax.deployment.flower.client_app.ask_worker", ask)
    message = sys.modules["flwr.app"].Message if "flwr.app" in sys.modules else library.load_flower("app").Message
    order = message(write_record(Packet({"kind": "x"}, b"12")), dst_node_id=5, message_type="query", ttl=40.0)
    order.metadata.__dict__.setdefault("message_id", "m0")
    reply = make_client_app()(order, SimpleNamespace(node_config={"socket": "/n/w.sock"}))
    assert asked == [("/n/w.sock", Packet({"kind": "x"}, b"12"), 40.0)]
    assert read_record(reply.content) == Packet({"kind": "reply"}, b"34")


def test_without_flower_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, "flwr.clientapp", raising=False)
    with pytest.raises(
        UserError, match=r"pip install '\.\[flower\]' in a clone of fedvlm-jax, in an environment of its own"
    ):
        make_client_app()


# --- The ServerApp ---


def test_the_server_app_coordinates_its_plan(flower, tmp_path, monkeypatch):
    """With the model and the folder that Flower's run is given."""
    given = []
    monkeypatch.setattr("fedvlm_jax.deployment.coordinator.coordinate", lambda *words: given.append(words) or words[3])
    monkeypatch.setattr("fedvlm_jax.deployment.plan.read_plan", lambda file: f"plan of {file.name}")
    monkeypatch.setattr("fedvlm_jax.utils.compilation_cache.keep_programs", lambda: None)
    with pytest.raises(UserError, match="does not say where the run shall be"):
        run_plan(tmp_path, {"out": ""}, Grid({}))
    assert run_plan(tmp_path, {"out": "runs/a", "model": ""}, Grid({7: echo})) == Path("runs/a")
    run_plan(tmp_path, {"out": "runs/a", "model": "./there"}, Grid({}))
    assert [(plan, model) for plan, model, *_ in given] == [
        ("plan of plan.json", None),
        ("plan of plan.json", "./there"),
    ]
    assert given[0][2].list_nodes() == [7]
