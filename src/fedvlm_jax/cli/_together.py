"""What the commands do when they are one of several processes: they meet, and they end together."""

import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedvlm_jax.cli._signals import exit_code, say
from fedvlm_jax.cli._supervise import LOST, end_with_parent
from fedvlm_jax.distributed.launch import DistributedOptions, describe_loss, join
from fedvlm_jax.errors import UserError, describe_os_error


@dataclass
class Together:
    """What is told when the processes end early.

    Attributes:
        folder: of the run, once it is known.
    """

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
        _end(_tell(error, about))


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(error: BaseException, about: Together) -> int:
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
            return say(describe_loss(gone, about.folder), LOST)
    traceback.print_exception(error)
    return 1
