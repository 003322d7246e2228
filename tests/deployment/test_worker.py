"""The worker of a node and whoever asks it: one order at a time, by real sockets and processes."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from fedvlm_jax.deployment import frames, worker
from fedvlm_jax.deployment.frames import KIND, LENGTHS
from fedvlm_jax.deployment.packets import MOST_HEADER, Packet
from fedvlm_jax.deployment.worker import open_worker
from fedvlm_jax.deployment.worker_client import ask_worker
from fedvlm_jax.errors import UserError


class Stop(BaseException):
    """Ends `serve`, as a signal does."""


@contextmanager
def serving(path, answer, notes=None):
    """A worker in a thread, ended by an order of its own."""

    def until_stopped(packet):
        if packet.header.get("kind") == "stop":
            raise Stop
        return answer(packet)

    def work(opened):
        with pytest.raises(Stop):
            opened.serve(until_stopped, (notes if notes is not None else []).append)

    with open_worker(path) as opened:
        thread = threading.Thread(target=work, args=(opened,))
        thread.start()
        try:
            yield opened
        finally:
            with pytest.raises(UserError, match="worker ended while it had the order"):
                ask_worker(path, Packet({"kind": "stop"}), 10)
            thread.join(10)


def echo(packet):
    return Packet({"kind": "echo", "of": packet.header}, packet.payload[::-1])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node" / "w.sock"


def test_an_order_is_answered_with_its_payload(path):
    large = os.urandom(5 * 2**20 + 3)
    with serving(path, echo):
        for payload in (b"", b"12", large):
            assert ask_worker(path, Packet({"kind": "x", "ä": [1]}, payload), 10) == Packet(
                {"kind": "echo", "of": {"kind": "x", "ä": [1]}}, payload[::-1]
            )


def test_the_socket_is_this_users_alone_and_goes_at_the_end(path):
    with serving(path, echo):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.parent.exists()
    with pytest.raises(UserError, match="worker is not running: start `fedvlm node`"):
        ask_worker(path, Packet({}), 1)


def test_one_order_at_a_time_and_all_are_answered(path):
    inside, most = [], []

    def slow(packet):
        inside.append(packet)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return echo(packet)

    replies = {}
    with serving(path, slow):
        ask = lambda number: replies.update({number: ask_worker(path, Packet({"number": number}), 10)})  # noqa: E731
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert {number: reply.header["of"]["number"] for number, reply in replies.items()} == {n: n for n in range(8)}
    assert max(most) == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no such round\nhere"), "no such round here"),
        (RuntimeError("odd"), "RuntimeError: odd"),
        (OSError(28, "No space left on device", "state"), "state: No space left on device (free some space there)"),
    ],
)
def test_what_an_answer_raises_is_told_in_a_line_and_the_worker_goes_on(path, error, told):
    def fail_once(packet):
        if packet.header["kind"] == "fail":
            raise error
        return echo(packet)

    notes = []
    with serving(path, fail_once, notes):
        assert ask_worker(path, Packet({"kind": "fail"}), 10).header == {"error": told}
        assert ask_worker(path, Packet({"kind": "x"}), 10).header["kind"] == "echo"
    assert notes[0] == f"an order failed: {told}"
    assert ("Traceback" in "".join(notes)) == isinstance(error, RuntimeError)


def connect(path):
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(5)
    stream.connect(str(path))
    return stream


def test_clients_that_hang_up_or_talk_nonsense_cost_themselves_alone(path):
    answered = []

    def answer(packet):
        answered.append(packet.header["kind"])
        return echo(packet)

    with serving(path, answer):
        for content in (b"", b"FV", LENGTHS.pack(KIND, 10, 10) + b"{", LENGTHS.pack(KIND, 2, 9) + b"{}half"):
            with connect(path) as stream:
                stream.sendall(content)
        refused = {
            "is no packet": (b"GET / HTTP/1.1\r\n\r\n", LENGTHS.pack(KIND, MOST_HEADER + 1, 0)),
            "is no JSON object": (LENGTHS.pack(KIND, 2, 0) + b"[]", LENGTHS.pack(KIND, 1, 0) + b"{"),
            "is no text": (LENGTHS.pack(KIND, 2, 0) + b"\xff\xfe",),
        }
        for told, contents in refused.items():
            for content in contents:
                with connect(path) as stream:
                    stream.sendall(content)
                    assert told in frames.receive_packet(stream, time.monotonic() + 5).header["error"]
        assert ask_worker(path, Packet({"kind": "x"}), 10).header["kind"] == "echo"
    assert answered == ["x"]


def test_who_hangs_up_while_waiting_is_not_answered_and_too_many_are_told(path, monkeypatch):
    monkeypatch.setattr(worker, "WAITING", 2)
    begun, go, answered, notes = threading.Event(), threading.Event(), [], []

    def answer(packet):
        begun.set()
        go.wait(10)
        answered.append(packet.header["kind"])
        return echo(packet)

    with serving(path, answer, notes) as opened:
        streams = []

        def order(kind, waiting):
            streams.append(connect(path))
            frames.send_packet(streams[-1], Packet({"kind": kind}), time.monotonic() + 5)
            while opened._orders.qsize() < waiting:
                time.sleep(0.005)

        order("first", 0)
        assert begun.wait(5)
        order("gone", 1)
        order("stays", 2)
        told = ask_worker(path, Packet({"kind": "many"}), 10)
        assert told.header["error"] == "2 orders are waiting for this node's worker already"
        streams[1].close()
        go.set()
        for number in (0, 2):
            assert frames.receive_packet(streams[number], time.monotonic() + 5).header["kind"] == "echo"
            streams[number].close()
    assert answered == ["first", "stays"]
    assert len(notes) == 1
    assert "taken back" in notes[0]


def test_a_reply_that_does_not_come_in_time_is_told(path):
    go = threading.Event()
    with serving(path, lambda packet: go.wait(10) and echo(packet)):
        with pytest.raises(UserError, match="did not answer within 0 seconds"):
            ask_worker(path, Packet({"kind": "x"}), 0.1)
        go.set()
        assert ask_worker(path, Packet({"kind": "x"}), 10).header["kind"] == "echo"


def test_a_running_worker_keeps_its_socket(path):
    with serving(path, echo):
        with pytest.raises(UserError, match="a running `fedvlm node` has it"), open_worker(path):
            pass
        assert ask_worker(path, Packet({"kind": "x"}), 10).header["kind"] == "echo"


HOLD = """
import sys, time
from pathlib import Path
from fedvlm_jax.deployment.worker import open_worker
with open_worker(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_socket_of_a_killed_worker_is_taken_over(path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    with pytest.raises(UserError, match="worker is not running"):
        ask_worker(path, Packet({}), 1)
    with serving(path, echo):
        assert ask_worker(path, Packet({"kind": "x"}), 10).header["kind"] == "echo"


def test_places_that_cannot_be_a_socket_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, told in (
        ("file", "no socket has that name"),
        ("link", "no socket"),
        ("file/w", "something else has that name"),
    ):
        with pytest.raises(UserError, match=told), open_worker(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="at most 103 bytes, and this one has"), open_worker(tmp_path / ("x" * 120)):
        pass


def test_a_process_that_asks_imports_nothing_heavy(path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom fedvlm_jax.deployment.packets import Packet\n"
        "from fedvlm_jax.deployment.worker_client import ask_worker\n"
        f"print(ask_worker(Path({str(path)!r}), Packet({{'kind': 'x'}}), 10).header['kind'])\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names - sys.stdlib_module_names - {'fedvlm_jax', '__main__'}))\n"
        "print(sorted(name for name in sys.modules if name.startswith('fedvlm_jax')))"
    )
    with serving(path, echo):
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    kind, others, ours = done.stdout.splitlines()
    assert kind == "echo"
    assert [name for name in eval(others) if not name.startswith(("_", "sitecustomize", "distutils-"))] == []
    assert set(eval(ours)) == {
        "fedvlm_jax", "fedvlm_jax.errors", "fedvlm_jax.deployment", "fedvlm_jax.deployment.frames",
        "fedvlm_jax.deployment.packets", "fedvlm_jax.deployment.worker_client",
    }  # fmt: skip
