"""How the processes of a run meet: what is refused before, and what each is told when they do not all come."""

import queue
import socket
import threading
from contextlib import closing

import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.runs.distributed import DistributedOptions, check_distributed, describe_loss, join
from fedvlm_jax.runs.meeting import meet, watch


def find_port():
    with closing(socket.socket()) as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def meet_all(*who, timeout=20.0, kept=None):
    """Processes as threads, (number, of how many) each -> what each was told; empty where it may go on. `kept` takes
    their connections."""
    port, told = find_port(), {}
    kept = {} if kept is None else kept

    def one(place, process, processes):
        try:
            kept[place] = meet("127.0.0.1", port, processes, process, timeout)
            told[place] = ""
        except UserError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=one, args=(place, *it)) for place, it in enumerate(who)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told[place] for place in range(len(who))]


def test_all_of_them_meet():
    assert meet_all((2, 3), (0, 3), (1, 3)) == ["", "", ""]


def test_one_process_meets_itself():
    assert meet("127.0.0.1", find_port(), 1, 0, 5.0) == {}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_hear_of_the_first_that_is_gone(victim):
    kept, heard = {}, {process: queue.Queue() for process in range(3)}
    meet_all((0, 3), (1, 3), (2, 3), kept=kept)
    for process in set(kept) - {victim}:
        watch(kept[process], heard[process].put)
    for connection in kept[victim].values():
        connection.close()
    for process in set(kept) - {victim}:
        assert heard[process].get(timeout=20) == victim


def test_who_says_goodbye_is_not_gone():
    kept, heard = {}, queue.Queue()
    meet_all((0, 2), (1, 2), kept=kept)
    leave = [watch(kept[process], heard.put) for process in range(2)]
    for go in leave:
        go()
    for process in range(2):
        for connection in kept[process].values():
            connection.close()
    with pytest.raises(queue.Empty):
        heard.get(timeout=0.3)


def test_who_is_missing_is_told_to_those_who_came():
    first, second = meet_all((0, 4), (2, 4), timeout=1.0)
    assert "process 1, 3 of 4 is not there" in first
    assert second == first


def test_processes_that_disagree():
    assert set(meet_all((0, 3), (1, 2))) == {"process 0 was told --distributed.processes 3, and process 1 2"}
    told = meet_all((0, 3), (1, 3), (1, 3))
    assert set(told) == {"there are two processes 1: each must have another --distributed.process"}


def test_nobody_listens():
    port = find_port()
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: process 0 did not answer there within 1 s"):
        meet("127.0.0.1", port, 2, 1, 1.0)


def test_a_port_that_is_taken():
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port}"):
            meet("127.0.0.1", port, 2, 0, 1.0)


def test_strangers_are_passed_over():
    port, told = find_port(), []

    def stranger():
        while not told:
            try:
                with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    told.append(connection.recv(10))
            except OSError:
                continue
        meet("127.0.0.1", port, 2, 1, 20.0)

    other = threading.Thread(target=stranger)
    other.start()
    meet("127.0.0.1", port, 2, 0, 20.0)
    other.join()
    assert told == [b""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1", "process": 0}, "--distributed.processes is missing"),
        ({"process": 0}, "--distributed.coordinator is missing"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "it is 0 to 1, and each process has another"),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "--distributed.process is -1"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "--distributed.processes is 0"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "expected HOST:PORT"),
        ({"coordinator": "a:99999", "processes": 2, "process": 0}, "expected HOST:PORT"),
        ({"on": True, "timeout": 0}, "--distributed.timeout is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options, message):
    asked = DistributedOptions(**options)
    assert asked.asked
    with pytest.raises(UserError, match=message):
        check_distributed(asked)


def test_what_can_be():
    check_distributed(DistributedOptions())
    check_distributed(DistributedOptions(on=True))
    check_distributed(DistributedOptions(coordinator="[::1]:9911", processes=2, process=1))
    assert not DistributedOptions().asked


def test_no_cluster(monkeypatch):
    import jax

    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    with pytest.raises(UserError, match=r"no cluster here \(coordinator_address should be defined\.\) Say where"):
        join(DistributedOptions(on=True), lambda process: None)


def test_where_a_run_goes_on(tmp_path):
    for name in ("8", "12", "13.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    told = describe_loss([1, 3], tmp_path)
    assert told.startswith(
        f"process 1 and 3 is gone. Start all processes again with the same command and --out {tmp_path}"
    )
    assert told.endswith("the run goes on after round 12, its newest checkpoint.")
    assert describe_loss(None, tmp_path / "none").endswith("from the start, for it has no checkpoint yet.")
