"""Keep the C heap between steps: on a CPU, returning buffers and faulting them in again costs up to half of a step.

XLA's CPU backend takes its buffers from malloc, and glibc returns every large one to the system when it is freed. The
`fedvlm` command asks it not to. Results do not change; the process keeps its peak memory until it ends.
"""

import ctypes
import os

__all__ = ["keep_heap"]

SWITCH = "FEDVLM_KEEP_HEAP"

# glibc's mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_heap() -> bool:
    """Make glibc keep freed memory; returns whether it does.

    Does nothing with another C library, or where the environment says `FEDVLM_KEEP_HEAP=0`. Call it before the first
    large allocation; libraries should leave the choice to the program, so nothing in this package calls it on import.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1), (_TOP_PAD, 200_000_000))  # -1: never
    accepted = [libc.mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)
