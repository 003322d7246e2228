"""Settings of malloc: a process that restarts has them and keeps what it frees; where it must not, nothing happens."""

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fedvlm_jax import __main__
from fedvlm_jax.cli._help import ALL
from fedvlm_jax.cli.main import commands_available
from fedvlm_jax.utils import malloc_settings
from fedvlm_jax.utils.malloc_settings import SETTINGS, restart_with_kept_memory

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux and glibc, which it is about")

SCRIPT = """
import ctypes, os, sys
from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory
restart_with_kept_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
before = libc.sbrk(0)
buffer = libc.malloc(3 * 2**30)
during = libc.sbrk(0)
libc.free(buffer)
print(sys.argv[1:], os.getpid(), during - before >= 3 * 2**30, libc.sbrk(0) >= during > before)
"""


def run(**environment):
    """A process's words, whether its number is that of the process started, and whether a large buffer was kept."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", SCRIPT, "--out", "a b"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**inherited, "JAX_PLATFORMS": "cpu", **environment}
    ) as process:
        said = process.communicate()[0].replace(str(process.pid), "same")
    assert process.returncode == 0
    return said.strip()


@LINUX
def test_a_process_keeps_its_words_its_number_and_a_buffer_of_more_than_two_gibibytes():
    """XLA takes all temporaries of a program as one buffer."""
    assert run() == "['--out', 'a b'] same True True"


@LINUX
@pytest.mark.parametrize("name", SETTINGS)
def test_who_has_chosen_a_setting_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it restarted"))
    restart_with_kept_memory()


@LINUX
def test_it_can_be_switched_off():
    assert run(MALLOC_ARENA_MAX="0") == "['--out', 'a b'] same False False"


@LINUX
@pytest.mark.parametrize(("chosen", "wanted"), [(None, "1"), ("3", "3")])
def test_numpy_has_one_thread_unless_somebody_chose(chosen, wanted, monkeypatch):
    for name in (*SETTINGS, "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    if chosen:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", chosen)
    started = []
    monkeypatch.setattr(os, "execve", lambda *command: started.append(command[2]))
    restart_with_kept_memory()
    assert started[0]["OPENBLAS_NUM_THREADS"] == wanted
    assert started[0].keys() >= SETTINGS.keys()


def test_where_an_accelerator_computes_nothing_happens(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc_settings, "expect_accelerator", lambda: True)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it restarted"))
    restart_with_kept_memory()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--rounds", "1"], ["restart", "run"]),
        (["compare"], ["restart", "run"]),
        (["train", "--help"], ["run"]),
        (["train", "--help-all"], ["run"]),
        (["cache"], ["run"]),
        (["report", "train"], ["run"]),
        (["explain"], ["run"]),
        (["--help"], ["run"]),
        ([], ["run"]),
    ],
)
def test_commands_that_compute_start_again_and_no_others(words, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["fedvlm", *words])
    monkeypatch.setattr(__main__, "restart_with_kept_memory", lambda: seen.append("restart"))
    monkeypatch.setattr("fedvlm_jax.cli.main.main", lambda: seen.append("run"))
    __main__.main()
    assert seen == expected


def test_every_command_that_computes_is_one():
    """A new command is put into one of the two, by whether it computes for long."""
    others = {"ask", "cache", "data", "demo", "deploy", "explain", "export", "report"}
    assert set(commands_available()) - set(__main__.COMPUTING) == others
    assert set(__main__.COMPUTING) <= set(commands_available())
    assert {ALL} <= __main__.HELP


ROOT = Path(__file__).parents[2]
CALL = "restart_with_kept_memory()"
SCRIPTS = [
    path
    for folder in ("benchmarks", "experiments", "tools/assets")
    for path in sorted((ROOT / folder).glob("*.py"))
    if CALL in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_restarts_before_it_imports_what_takes_long(script):
    body = ast.parse(script.read_text(encoding="utf-8")).body
    first = next(place for place, node in enumerate(body) if CALL in ast.unparse(node))
    before = [node for node in body[:first] if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in before} <= {
        "from __future__ import annotations",
        "from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory",
    }


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
def test_an_accelerator_is_expected_by_devices_and_plugins(monkeypatch, tmp_path, platforms, device, plugins, expected):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    monkeypatch.setattr(metadata, "entry_points", lambda group: [name for name in plugins if name != "libtpu"])
    monkeypatch.setattr(malloc_settings, "find_spec", lambda name: name if name in plugins else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert malloc_settings.expect_accelerator(tmp_path) is expected
