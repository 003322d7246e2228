"""A parent reads why jax aborted its child, and passes on all else: with small children in the place of a run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedvlm_jax.cli._process.supervise import LOST, read_abort, supervise
from fedvlm_jax.distributed.launch import DistributedOptions

TWO = DistributedOptions(coordinator="127.0.0.1:9911", processes=2, process=1, timeout=7)
# As jax 0.10.2 writes them, cut after the first lines of the stack.
FATAL = "F1128 23:07:05.320102    7254 client.h:80] Terminating process because the JAX service failed. absl::Status: "
STACK = "*** Check failure stack trace: ***\n    @     0x7ff78a240634  absl::lts_20260107::log_internal\n"
ABSENT = (
    FATAL + "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n" + STACK
)
TWICE = FATAL + "ALREADY_EXISTS: Aborted connect attempt.\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n"
SILENT = (
    "E1128 23:08:54.758866    8986 coordination_service.cc:1549] [94] Use error polling to propagate the following "
    "error: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have "
    "crashed.\n" + FATAL + "UNAVAILABLE\n" + STACK
)
LEADER = (
    "E1128 23:08:40.139621    8496 coordination_service_agent.cc:289] Polled an error from coordination service.\n"
    + FATAL + "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted\n" + STACK
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (ABSENT, 2, r"after 7 s not all of 2 processes were there: start each of them with"),
        (TWICE, 2, r"another process came as process 1 too: each must have another --distributed\.process"),
        (SILENT, LOST, r"process 1 and 3 is gone\. Start all processes again with the same command"),
        (LEADER, LOST, r"process 0 is gone\. Start all processes again with the same command"),
    ],
)
def test_an_abort_of_jax_becomes_one_line(text, code, message, capfd):
    write = f"import os, sys; sys.stderr.write({text!r}); sys.stderr.flush(); os.abort()"
    assert supervise([sys.executable, "-c", write], TWO, None) == code
    said = capfd.readouterr().err
    assert re.fullmatch(rf"fedvlm: {message}[^\n]*\n", said)


def test_a_cluster_s_own_numbers_are_not_ours_to_name():
    ending = read_abort(ABSENT, DistributedOptions(on=True), None)
    assert ending is not None
    assert ending.message.startswith("after 300 s not all processes were there")


def test_an_abort_for_another_reason_is_shown_whole(capfd):
    write = "import os, sys; sys.stderr.write('one\\nF1128 23:07:05.3  7254 client.h:80] odd\\nmore\\n'); os.abort()"
    write = write.replace("os.abort()", "sys.stderr.flush(); os.abort()")
    assert supervise([sys.executable, "-c", write], TWO, None) == 128 + signal.SIGABRT
    assert capfd.readouterr().err == "one\nF1128 23:07:05.3  7254 client.h:80] odd\nmore\n"


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_stderr_and_exit_code_are_the_child_s(code, capfd):
    lines = ["round 1/2", "fedvlm: no", "E1128 23:08:40.1  8496 coordination_service_agent.cc:289] Polled", "more"]
    write = f"import sys; print(*{lines!r}, sep='\\n', file=sys.stderr); sys.exit({code})"
    assert supervise([sys.executable, "-c", write], TWO, None) == code
    # What jax logs beside a message of the command's own is left out; with a traceback it may matter.
    assert capfd.readouterr().err.splitlines() == (lines if code == 1 else lines[:2])


PARENT = """
import sys
from fedvlm_jax.cli._process.signals import heed_signals
from fedvlm_jax.cli._process.supervise import supervise
from fedvlm_jax.distributed.launch import DistributedOptions
with heed_signals():
    sys.exit(supervise([sys.executable, "-c", sys.argv[1]], DistributedOptions(on=True), None))
"""
CHILD = """
import os, signal, sys, time
from fedvlm_jax.cli._process.supervise import end_with_parent
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
end_with_parent()
print("pid", os.getpid(), file=sys.stderr, flush=True)
time.sleep(60)
"""


@pytest.fixture
def family():
    """-> the parent's process and the child's number."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stderr=subprocess.PIPE, text=True)
    yield parent, int(parent.stderr.readline().split()[1])
    parent.kill()
    parent.communicate()


def wait_until_gone(number):
    for _ in range(200):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_that_ends_by_itself_ends_well(capfd):
    """A thread that reads stdin must not hold what the interpreter needs to end."""
    write = "from fedvlm_jax.cli._process.supervise import end_with_parent; import time; "
    write += "end_with_parent(); time.sleep(0.2); print('x')"
    assert supervise([sys.executable, "-c", write], TWO, None) == 0
    assert capfd.readouterr() == ("x\n", "")


def test_signals_are_passed_on(family):
    parent, child = family
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == 143
    assert wait_until_gone(child)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks up processes in /proc")  # noqa: PTH112
def test_a_child_does_not_outlive_its_parent(family):
    parent, child = family
    parent.kill()
    assert wait_until_gone(child)
