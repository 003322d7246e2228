"""Keep the C heap between steps: on a CPU, returning buffers and faulting them in again costs up to half of a step.

XLA's CPU backend takes its buffers from malloc, and glibc returns every large one to the system when it is freed. The
`fedvlm` command asks it not to, and asks Linux for huge pages, of which there are 512 times fewer to fault in: in a
virtual machine 4 GiB of small ones can take seconds. Results do not change; the process keeps its peak memory until it
ends. It has to be asked before there are threads: one that has allocated has a heap of its own, which threads that
start later may be given too, and from there large buffers are returned whatever was asked. All threads then share one
heap, which two cores do not mind; the threads that compile for an accelerator, whose buffers are elsewhere, stand in
line for it: on a machine of 16 cores a compilation took 88 s and not 36. So it is left alone where an accelerator is
going to be used.
"""

import ctypes
import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

__all__ = ["expect_accelerator", "keep_heap"]

SWITCH = "FEDVLM_KEEP_HEAP"

DEVICES = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd", "dxg")
"""Accelerators among Linux's devices: NVIDIA's, TPUs, AMD's, and GPUs under Windows."""

# glibc's mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20  # Linux's madvise, and the size of a page


def keep_heap() -> bool:
    """Make glibc keep freed memory; returns whether it will, for all threads.

    Does nothing with another C library, where an accelerator is going to be used, or where the environment says
    `FEDVLM_KEEP_HEAP=0`; 1 there is for any device. Call it before anything that may start threads is imported: numpy,
    pyarrow and jax do. Libraries should leave the choice to the program, so nothing in this package calls it on import.
    """
    told = os.environ.get(SWITCH)
    if told == "0" or (told != "1" and expect_accelerator()):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1), (_TOP_PAD, 200_000_000))  # -1: never
    accepted = [libc.mallopt(parameter, value) == 1 for parameter, value in settings]
    if all(accepted):
        _ask_for_huge_pages(libc)
    return all(accepted) and _count_heaps(libc) == 1


def expect_accelerator(devices: Path = Path("/dev")) -> bool:
    """Will jax compute on something else than the CPU? Told by the environment and the machine, without asking jax.

    Args:
        devices: the folder of Linux's devices.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return not platforms.startswith("cpu")
    there = any(next(devices.glob(pattern), None) for pattern in DEVICES)
    return there and (bool(entry_points(group="jax_plugins")) or find_spec("libtpu") is not None)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap to three quarters of the memory, say that it may be of huge pages, and give it back to malloc.

    That takes addresses, not memory: no page is touched. Where so much is refused nothing happens.
    """
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := libc.malloc(size):
        first = -(-start // _HUGE) * _HUGE
        libc.madvise(first, (start + size - first) // _HUGE * _HUGE, _MADV_HUGEPAGE)
        libc.free(start)


def _count_heaps(libc: ctypes.CDLL) -> int:
    """How many heaps malloc has: the program's own, and those of threads that allocated before."""
    text, length = ctypes.c_char_p(), ctypes.c_size_t()
    libc.open_memstream.restype = ctypes.c_void_p
    libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(length))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    found = (text.value or b"").count(b"<heap nr=")
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.free(text)
    return found
