"""What `keep_heap` asks of glibc, seen by where its heap ends; no page is touched."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax.utils import heap

SCRIPT = """
import ctypes
from pathlib import Path
from fedvlm_jax.utils.heap import keep_heap
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


LATE = """
import threading
from fedvlm_jax.utils.heap import keep_heap
allocated, ended = threading.Event(), threading.Event()
def allocate():
    kept = bytearray(1000)
    allocated.set()
    ended.wait()
threading.Thread(target=allocate).start()
allocated.wait()
print(keep_heap())
ended.set()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux and glibc, which it is about")
def test_it_says_so_where_a_thread_has_a_heap_of_its_own_already():
    """Threads that start later may be given that heap, and large buffers are not kept in it."""
    environment = {**os.environ, "FEDVLM_KEEP_HEAP": "1"}
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False"]


ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for folder in ("benchmarks", "experiments", "tools/assets")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "keep_heap()" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_keeps_its_heap_before_it_imports_what_starts_threads(script):
    body = ast.parse(script.read_text(encoding="utf-8")).body
    first = next(place for place, one in enumerate(body) if "keep_heap()" in ast.unparse(one))
    before = [one for one in body[:first] if isinstance(one, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(one) for one in before} <= {
        "from __future__ import annotations", "from fedvlm_jax.utils.heap import keep_heap",
    }  # fmt: skip


def test_there_are_such_scripts():
    assert {"speed", "curves", "population", "study_emoji", "pretrain_nano"} <= {script.stem for script in SCRIPTS}


@pytest.mark.parametrize(
    ("platforms", "device", "plugins", "expected"),
    [
        (None, "nvidia0", ["jax_cuda13"], True),
        (None, "vfio/0", ["libtpu"], True),
        (None, "accel0", ["libtpu"], True),
        (None, "nvidia0", [], False),  # a GPU, and a jax for the CPU
        (None, "nvidiactl", ["jax_cuda13"], False),
        (None, "null", ["libtpu"], False),  # `fedvlm plan` without a TPU
        ("cpu", "nvidia0", ["jax_cuda13"], False),
        ("cuda,cpu", "null", [], True),
    ],
)
def test_where_an_accelerator_computes_the_heap_is_left_alone(
    monkeypatch, tmp_path, platforms, device, plugins, expected
):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    monkeypatch.setattr(heap, "entry_points", lambda group: [name for name in plugins if name != "libtpu"])
    monkeypatch.setattr(heap, "find_spec", lambda name: name if name in plugins else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert heap.expect_accelerator(tmp_path) is expected


def test_the_environment_has_the_last_word(monkeypatch):
    monkeypatch.setattr(heap, "expect_accelerator", lambda: True)
    monkeypatch.delenv(heap.SWITCH, raising=False)
    assert heap.keep_heap() is False
    monkeypatch.setenv(heap.SWITCH, "0")
    assert heap.keep_heap() is False
