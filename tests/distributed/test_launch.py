"""The options of several processes: what is refused before anything is loaded, and where process 0 listens."""

import jax
import pytest

from fedvlm_jax.distributed.launch import DistributedOptions, check_distributed, describe_loss, join
from fedvlm_jax.errors import UserError


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


@pytest.fixture
def asked(monkeypatch):
    """-> what jax.distributed.initialize is asked, by name; it is not done. asked["error"] is raised in its place."""
    seen = {}

    def initialize(coordinator, processes, process, **others):
        seen.update(others, coordinator=coordinator)
        if "error" in seen:
            raise seen["error"]

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    return seen


def test_no_cluster(asked):
    asked["error"] = ValueError("coordinator_address should be defined.")
    with pytest.raises(UserError, match=r"no cluster here \(coordinator_address should be defined\.\) Say where"):
        join(DistributedOptions(on=True))


def test_process_0_listens_where_it_was_told(asked, monkeypatch):
    here = DistributedOptions(coordinator="127.0.0.1:9911", processes=2, process=0)
    join(here)
    assert asked["coordinator_bind_address"] == "127.0.0.1:9911"  # jax alone would listen at all addresses
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "10.0.0.1:9911")
    join(here)
    assert asked["coordinator_bind_address"] == "10.0.0.1:9911"
    join(DistributedOptions(on=True))
    assert asked["coordinator"] is None


def test_a_port_that_is_taken(asked):
    asked["error"] = jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9911: process 0 cannot listen there .* is the port free\?"):
        join(DistributedOptions(coordinator="127.0.0.1:9911", processes=2, process=0))


def test_where_a_run_goes_on(tmp_path):
    for name in ("8", "12", "13.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    told = describe_loss([1, 3], tmp_path)
    assert told.startswith(
        f"process 1 and 3 is gone. Start all processes again with the same command and --out {tmp_path}"
    )
    assert told.endswith("the run goes on after round 12, its newest checkpoint.")
    assert describe_loss(None, tmp_path / "none").endswith("from the start, for it has no checkpoint yet.")
