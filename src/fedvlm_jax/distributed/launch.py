"""The options of a run that several processes make together, and how they find each other.

No heavy package is imported here, so that `--help` answers at once.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.errors import UserError, explain_error

SILENCE = 30
"""Seconds without a heartbeat after which a process counts as gone, and the others end."""

_CLUSTER = "(default: as the cluster tells)"


@dataclass(frozen=True)
class DistributedOptions:
    """Several processes, on one machine or many, that make one run together: each is started with the same command"""

    on: Annotated[
        bool,
        tyro.conf.arg(aliases=("--distributed",), help_behavior_hint="(default: by itself)"),
        tyro.conf.FlagCreatePairsOff,
    ] = False
    """Be one of several processes. On TPU pods, under Slurm and Open MPI that is all; elsewhere say also what follows.
    The run's folder must be on a disk that all of them share. If one dies the others end; the same command, given to
    all of them again, goes on from the last checkpoint."""
    coordinator: Annotated[str, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint=_CLUSTER)] = ""
    """Where process 0 listens and the others find it: its address, and any port that is free there."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_CLUSTER)] = None
    """How many processes there are."""
    process: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_CLUSTER)] = None
    """Which of them this is, from 0."""
    timeout: int = 300
    """Seconds to wait for all of them at the start."""

    @property
    def asked(self) -> bool:
        """Tell whether this is one of several processes.

        >>> DistributedOptions().asked, DistributedOptions(on=True).asked
        (False, True)
        """
        return self != DistributedOptions()


def check_distributed(options: DistributedOptions) -> None:
    """Refuse the first option, or pair of options, that cannot work, before anything is loaded.

    Raises:
        UserError: the first option, or pair of options, that cannot work.
    """
    processes, process = options.processes, options.process
    stated = {
        "--distributed.coordinator": options.coordinator or None,
        "--distributed.processes": processes,
        "--distributed.process": process,
    }
    missing = [flag for flag, value in stated.items() if value is None]
    if 0 < len(missing) < len(stated):
        raise UserError(
            f"{missing[0]} is missing: {', '.join(stated)} go together; on TPU pods and under Slurm leave them out"
        )
    if options.timeout < 1:
        raise UserError(f"--distributed.timeout is {options.timeout}: it must be 1 or more")
    if processes is None or process is None:
        return
    if processes < 1:
        raise UserError(f"--distributed.processes is {processes}: it must be 1 or more")
    if not 0 <= process < processes:
        raise UserError(
            f"--distributed.process is {process}: with --distributed.processes {processes} it is "
            f"0 to {processes - 1}, and each process has another"
        )
    port = re.fullmatch(r".+:(\d+)", options.coordinator)
    if port is None or not 0 < int(port[1]) < 2**16:
        raise UserError(
            f"--distributed.coordinator {options.coordinator}: expected HOST:PORT, for example 10.0.0.1:9911"
        )


def join(options: DistributedOptions) -> None:
    """Meet the other processes; to be called before jax is asked for anything.

    Process 0 listens at its stated address and at no other, unless JAX_COORDINATOR_BIND_ADDRESS says where. Whoever
    reaches it can take part or disturb: jax's service asks nobody who they are.

    Raises:
        UserError: no cluster says where the processes are, or process 0 cannot listen at its address.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would have a process survive a plain kill
    try:
        jax.distributed.initialize(
            options.coordinator or None,
            options.processes,
            options.process,
            initialization_timeout=options.timeout,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
            # Without an address jax listens at all that the machine has.
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or options.coordinator or None,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed found no cluster here ({error}) Say where the processes are: --distributed.coordinator "
            "HOST:PORT --distributed.processes N --distributed.process I"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--distributed.coordinator {options.coordinator}: process 0 cannot listen there "
            f"({explain_error(error)}). Is it an address of this machine, and is the port free? "
            "JAX_COORDINATOR_BIND_ADDRESS=HOST:PORT listens elsewhere"
        ) from None


def describe_loss(gone: list[int] | None, folder: Path | None) -> str:
    """Advise what to do when a run ended because some of its processes did.

    >>> describe_loss([1, 3], None)
    'process 1 and 3 is gone. Start all processes again with the same command: the run goes on from the start, ...'
    """
    names = " and ".join(map(str, gone or [])) or "other than this"
    saved = [] if folder is None else [path.name for path in (folder / "checkpoints").glob("*")]
    newest = max((int(name) for name in saved if name.isdigit()), default=0)
    place = f"after round {newest}, its newest checkpoint" if newest else "from the start, for it has no checkpoint yet"
    again = "the same command" if folder is None else f"the same command and --out {folder}, or with --resume {folder}"
    return f"process {names} is gone. Start all processes again with {again}: the run goes on {place}."
