"""Several processes: each has a parent, which puts jax's reasons for an abort into one line; all end together.

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
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedvlm_jax.cli._process.signals import exit_code, say
from fedvlm_jax.distributed.launch import DistributedOptions, describe_loss, join
from fedvlm_jax.errors import UserError, describe_os_error

LOST = 3  # exit code of a process that ended because another did: nothing was wrong with what it was asked
CHILD = "FEDVLM_SUPERVISED"  # environment variable that tells the child that it is one
# The first words of what jax's coordination service logs; the lines after it may belong to it.
JAX_ERROR = re.compile(rb"[EFW]\d{4} [\d:.]+ +\d+ (client\.h|coordination_service|add_port)")
# Exit codes after which the child has said all there is to say.
EXPLAINED = {0, 2, LOST, 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP}


class Ending(NamedTuple):
    """The exit code of a parent after its child's abort, and the line that says why."""

    code: int
    message: str


def supervise(command: Sequence[str], options: DistributedOptions, folder: Path | None) -> int:
    """Run a command as a child and pass on its stderr, signals and exit code.

    Returns:
        The exit code: the child's, 2 where not all processes came, `LOST` where another one is gone.
    """
    environment, pipe = {**os.environ, CHILD: "1"}, subprocess.PIPE
    # In a session of its own, so that Ctrl-C reaches the child once, through this process.
    child = subprocess.Popen(command, stdin=pipe, stderr=pipe, env=environment, start_new_session=True)
    held: list[bytes] = []
    while True:
        try:
            _pass_on(child, held)
            code = child.wait()
            break
        except KeyboardInterrupt as stop:
            child.send_signal(exit_code(stop) - 128)
    text = b"".join(held).decode(errors="replace")
    if code == -signal.SIGABRT and (ending := read_abort(text, options, folder)) is not None:
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


def end_with_parent() -> None:
    """End this process once its parent is gone, however that ended: the parent holds the other end of stdin."""

    def wait() -> None:
        # Not through sys.stdin, whose lock a daemon thread would hold while the interpreter ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class Together:
    """The folder of the processes' run, once it is known, for what is said when they end early."""

    folder: Path | None = None


@contextmanager
def together(options: DistributedOptions) -> Generator[Together]:
    """Be one of several processes while the block lasts, which all of them leave together.

    What ends one of them early ends its process at once: on the way that Python takes out, jax waits for processes that
    will not come, and then aborts.
    """
    about = Together()
    if not options.asked:
        yield about
        return
    end_with_parent()
    try:
        join(options)
        yield about
        from fedvlm_jax.distributed import processes

        processes.wait_for_all()
    except BaseException as error:
        code = _report(error, about.folder)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _report(error: BaseException, folder: Path | None) -> int:
    """Say what ended this process; returns its exit code."""
    from jax.errors import JaxRuntimeError

    from fedvlm_jax.distributed import processes

    if isinstance(error, UserError | OSError):
        return say(describe_os_error(error) if isinstance(error, OSError) else str(error), 2)
    if isinstance(error, KeyboardInterrupt):
        return say("stopped, and the other processes with it", exit_code(error))
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, JaxRuntimeError):
        gone = processes.find_gone()
        if gone != []:
            return say(describe_loss(gone, folder), LOST)
    traceback.print_exception(error)
    return 1
