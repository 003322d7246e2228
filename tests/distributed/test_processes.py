"""What one process does alone, and what several exchange, with a dictionary in the place of the service."""

import json

import jax
import numpy as np
import pytest

from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError


class Service:
    """What the processes share."""

    def __init__(self):
        self.kept = {}

    def key_value_set(self, key, value):
        self.kept[key] = value

    def blocking_key_value_get(self, key, timeout):
        return self.kept[key]


@pytest.fixture
def be(monkeypatch):
    """be(process, processes) -> the service; from then on this is that process."""
    service = Service()

    def become(process, count):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(processes, "_client", lambda: service)
        return service

    return become


def test_alone():
    assert processes.is_first()
    assert processes.share_out(3).tolist() == [0, 1, 2]
    assert processes.tell_all(lambda: "x") == "x"
    assert processes.smallest(5) == 5
    processes.wait_for_all()
    np.testing.assert_array_equal(processes.gather(np.arange(3), 3), np.arange(3))


def test_everything_is_somebody_s(be):
    shares = []
    for process in range(3):
        be(process, 3)
        shares += processes.share_out(8).tolist()
    assert sorted(shares) == list(range(8))


def test_what_was_shared_out_comes_together_in_its_order(be, monkeypatch):
    from jax.experimental import multihost_utils

    padded = []
    for process in (0, 1, 2):  # the first two leave behind what the third is then given
        be(process, 3)
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda value: padded.append(value) or np.stack(padded[-1:] * 3)
        )
        own = processes.share_out(7)
        processes.gather(np.stack([own, -own], axis=1), 7)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.stack(padded))
    found = processes.gather(np.stack([own, -own], axis=1), 7)
    np.testing.assert_array_equal(found, np.stack([np.arange(7), -np.arange(7)], axis=1))


def test_the_first_decides_for_all(be, monkeypatch):
    service = be(0, 2)
    assert processes.tell_all(lambda: {"a": 1}) == {"a": 1}
    service.kept = dict.fromkeys(service.kept, json.dumps({"value": 2}))
    monkeypatch.setattr(service, "blocking_key_value_get", lambda key, timeout: next(iter(service.kept.values())))
    be(1, 2)
    monkeypatch.setattr(processes, "_client", lambda: service)
    assert processes.tell_all(lambda: pytest.fail("the second does not decide")) == 2


def test_what_the_first_refuses_all_refuse(be, monkeypatch):
    service = be(0, 2)

    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        processes.tell_all(refuse)
    monkeypatch.setattr(service, "blocking_key_value_get", lambda key, timeout: next(iter(service.kept.values())))
    be(1, 2)
    with pytest.raises(UserError, match="no"):
        processes.tell_all(lambda: None)


def test_who_is_gone(be, monkeypatch):
    service = be(0, 4)
    said = (
        "DEADLINE_EXCEEDED: Barrier timed out. Id: fedvlm/gone::0. # of tasks that reached the barrier: 2/4.\n"
        "The first task at the barrier: 0. Some timed out task names:\n3\n1\n\n\nRPC: /xla.coordination"
    )

    def wait_at_barrier(name, timeout):
        raise jax.errors.JaxRuntimeError(said)

    service.wait_at_barrier = wait_at_barrier
    assert processes.find_gone() == [1, 3]
    said = "UNAVAILABLE: failed to connect"
    assert processes.find_gone() is None
    service.wait_at_barrier = lambda name, timeout: None
    assert processes.find_gone() == []
