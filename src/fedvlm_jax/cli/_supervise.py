"""A parent for each of several processes, which puts jax's reasons for an abort into one line.

`jax.distributed` ends a process from C++ (abort, with a stack) when another one is gone or does not come. Nothing in
that process can catch it: `jax.distributed.initialize` takes no callback. So `fedvlm train --distributed` starts
itself again as a child, passes the child's stderr on, and reads what jax wrote when the child was aborted.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvlm_jax.cli._signals import exit_code, say
from fedvlm_jax.distributed.launch import DistributedOptions, describe_loss

LOST = 3
"""Exit code of a process that ended because another did: nothing was wrong with what it was asked."""

CHILD = "FEDVLM_SUPERVISED"
"""Environment variable that tells the child that it is one."""

JAX_ERROR = re.compile(rb"[EFW]\d{4} [\d:.]+ +\d+ (client\.h|coordination_service|add_port)")
"""The first words of what jax's coordination service logs; the lines after it may belong to it."""

EXPLAINED = {0, 2, LOST, 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP}
"""Exit codes after which the child has said all there is to say."""


@dataclass(frozen=True)
class Ending:
    """What a child's end means.

    Attributes:
        code: the exit code for the parent.
        message: one line, or empty.
    """

    code: int
    message: str


def is_child() -> bool:
    """Tell whether this process was started by `supervise`."""
    return CHILD in os.environ


def end_with_parent() -> None:
    """End this process once its parent is gone, however that ended: the parent holds the other end of stdin."""

    def wait() -> None:
        # Not through sys.stdin, whose lock a daemon thread would hold while the interpreter ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def supervise(command: Sequence[str], options: DistributedOptions, folder: Path | None) -> int:
    """Run a command as a child and pass on its stderr, signals and exit code.

    Args:
        command: the program and its arguments.
        options: of the processes, for what is said about them.
        folder: of the run, where it is known.

    Returns:
        The exit code: the child's, 2 where not all processes came, `LOST` where another one is gone.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, CHILD: "1"},
        start_new_session=True,  # Ctrl-C reaches the child once, through this process
    )

    held: list[bytes] = []
    while True:
        try:
            _pass_on(child, held)
            code = child.wait()
            break
        except KeyboardInterrupt as stop:
            child.send_signal(exit_code(stop) - 128)
    text = b"".join(held).decode(errors="replace")
    ending = read_abort(text, options, folder) if code == -signal.SIGABRT else None
    if ending is not None:
        return say(ending.message, ending.code)
    if code not in EXPLAINED:
        sys.stderr.write(text)
    return code if code >= 0 else 128 - code


def _pass_on(child: subprocess.Popen[bytes], held: list[bytes]) -> None:
    """Write the child's stderr to this process's; what follows jax's first error is held, but for the command's own."""
    assert child.stderr is not None
    for line in child.stderr:
        if not line.startswith(b"fedvlm: ") and (held or JAX_ERROR.match(line)):
            held.append(line)
            continue
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()


def read_abort(text: str, options: DistributedOptions, folder: Path | None) -> Ending | None:
    r"""Find in what jax wrote before it aborted why it did; None where it does not say.

    Examples:
        >>> text = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n2\nThe tasks"
        >>> read_abort(text, DistributedOptions(processes=3, process=0), None).message[:19]
        'process 2 is gone. '
    """
    if "RegisterTask" in text:
        who = f" as process {options.process}" if options.process is not None else ""
        if "ALREADY_EXISTS" in text:
            return Ending(2, f"another process came{who} too: each must have another --distributed.process")
        count = f"of {options.processes} processes" if options.processes else "processes"
        return Ending(
            2,
            f"after {options.timeout} s not all {count} were there: start each of them with the same "
            "--distributed.coordinator (the address of process 0, reachable from all) and --distributed.processes, and "
            "with another --distributed.process; --distributed.timeout waits longer",
        )
    silent = re.search(r"stopped sending heartbeats\):\s*((?:\S*?\d+\s+)+)The tasks", text)
    if silent is not None:
        gone = [int(number) for number in re.findall(r"(\d+)(?=\s)", silent[1])]
        return Ending(LOST, describe_loss(gone, folder))
    if "Failed to send RPC to coordination service" in text:
        return Ending(LOST, describe_loss([0], folder))
    return None
