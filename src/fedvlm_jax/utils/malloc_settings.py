"""Settings of glibc's malloc that keep freed memory with the process, for computing on a CPU.

XLA's CPU backend takes its buffers from malloc, and glibc returns large ones to the system when they are freed: to
fault them in again costs processor time, more with larger buffers (docs/log). Results do not change; the process keeps
its peak memory until it ends.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

SETTINGS = {
    "MALLOC_ARENA_MAX": "1",  # in a thread's arena large buffers are returned whatever the next two say
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
    "MALLOC_TOP_PAD_": str(200_000_000),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages: 512 times fewer to fault in
}
"""Variables of the environment, which glibc reads when a process starts."""

THREADS = {"OPENBLAS_NUM_THREADS": "1"}
"""NumPy's threads wait for one another and for XLA's: on two busy cores many small decompositions took 20 times as long
with two of them. What the environment says goes first."""

DEVICES = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd", "dxg")
"""Accelerators among Linux's devices: NVIDIA's, TPUs, AMD's, and GPUs under Windows."""


def restart_with_kept_memory() -> None:
    """Start this very process again, with its words and its number, under `SETTINGS` and `THREADS`.

    Does nothing where the environment has one of them already (so `MALLOC_ARENA_MAX=0` switches it off), and where an
    accelerator is going to be used: its buffers are elsewhere, and the threads that compile for it would share one
    heap; on 16 cores a compilation took 88 s in place of 36. Processes that this one starts inherit the settings.
    """
    if sys.platform.startswith("linux") and not SETTINGS.keys() & os.environ.keys() and not expect_accelerator():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], THREADS | os.environ | SETTINGS)


def expect_accelerator(devices: Path = Path("/dev")) -> bool:
    """Tell from the environment and the machine, without asking jax, whether it will compute on something else."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return not platforms.startswith("cpu")
    if not any(next(devices.glob(pattern), None) for pattern in DEVICES):
        return False
    from importlib.metadata import entry_points  # late: it takes as long to import as half of the command line

    return bool(entry_points(group="jax_plugins")) or find_spec("libtpu") is not None
