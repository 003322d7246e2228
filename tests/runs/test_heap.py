"""What `keep_heap` asks of glibc, seen by where its heap ends; no page is touched."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
from pathlib import Path
from fedvlm_jax.runs.heap import keep_heap
libc = ctypes.CDLL("libc.so.6")
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
before = libc.sbrk(0)
kept = keep_heap()
buffer = libc.malloc(3 * 2**30)
during = libc.sbrk(0)
libc.free(buffer)
print(kept, during - before >= 3 * 2**30, libc.sbrk(0) >= during > before)
with open("/proc/self/smaps") as maps:
    heaps = maps.read().split("[heap]")[1:]
flags = [heap.partition("VmFlags:")[2].splitlines()[0].split() for heap in heaps]
print(any("hg" in some for some in flags) or (kept and not Path("/sys/kernel/mm/transparent_hugepage").exists()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux and glibc, which it is about")
@pytest.mark.parametrize(("switch", "expected"), [("1", ["True"] * 4), ("0", ["False"] * 4)])
def test_a_buffer_of_more_than_two_gibibytes_stays_with_the_process_and_may_have_huge_pages(switch, expected):
    """XLA takes all temporaries of a program as one buffer."""
    environment = {**os.environ, "FEDVLM_KEEP_HEAP": switch}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == expected
