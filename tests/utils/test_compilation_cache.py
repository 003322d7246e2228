"""The compilation cache of the commands: where it is, who may say otherwise, and that programs are found in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedvlm_jax.utils.compilation_cache import FOLDER, SETTINGS, SWITCH, keep_programs


@pytest.fixture
def home(monkeypatch, tmp_path, undecided):
    """An environment that says nothing, and no jax to tell."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "jax")
    return tmp_path


def test_programs_are_kept_in_the_user_s_cache_a_folder_per_kind_of_processor(home):
    folder = keep_programs()
    assert folder is not None
    assert folder.parent == home / "cache" / "fedvlm-jax" / "programs"
    assert folder.is_dir()
    assert os.environ[FOLDER] == str(folder)


def test_a_folder_may_be_named_and_what_cannot_be_made_is_left_out(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv(SWITCH, str(home / "file" / "below"))
    assert keep_programs() is None
    monkeypatch.setenv(SWITCH, str(home / "own"))
    assert keep_programs() == home / "own"


@pytest.mark.parametrize(("name", "value"), [(SWITCH, "0"), (FOLDER, "/somewhere")])
def test_whoever_has_decided_is_left_alone(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert keep_programs() is None
    assert os.environ.get(FOLDER) == (value if name == FOLDER else None)
    assert not (home / "cache").exists()


def test_a_relative_xdg_folder_does_not_count(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(home))
    folder = keep_programs()
    assert folder is not None
    assert Path(home / ".cache") in folder.parents


def test_the_folder_is_closed_to_others(home):
    folder = keep_programs()
    assert folder.stat().st_mode & 0o777 == 0o700


def spoil_owner(folder, monkeypatch):
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)


def spoil_mode(folder, monkeypatch):
    folder.chmod(0o777)


def spoil_way(folder, monkeypatch):
    folder.parent.chmod(0o777)


def spoil_link(folder, monkeypatch):
    """The folder is a link of somebody else's."""
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")
    lstat = Path.lstat
    other = SimpleNamespace(st_uid=os.getuid() + 1, st_mode=folder.lstat().st_mode)
    monkeypatch.setattr(Path, "lstat", lambda self: other if self == folder else lstat(self))


def spoil_file(folder, monkeypatch):
    (folder / "jit_round-cache").touch()
    (folder / "jit_round-cache").chmod(0o666)


def spoil_content(folder, monkeypatch):
    (folder / "jit_round-cache").symlink_to("/etc/hostname")


@pytest.mark.parametrize("spoil", [spoil_owner, spoil_mode, spoil_way, spoil_link, spoil_file, spoil_content])
def test_a_folder_that_others_may_write_is_not_used_and_one_line_says_so(home, monkeypatch, capsys, spoil):
    """What lies there is run as machine code."""
    own = home / "way" / "own"
    own.mkdir(parents=True, mode=0o700)
    spoil(own, monkeypatch)
    monkeypatch.setenv(SWITCH, str(own))
    assert keep_programs() is None
    assert FOLDER not in os.environ
    told = capsys.readouterr().err
    assert told.startswith("fedvlm: compiled programs are not kept: ")
    assert told.count("\n") == 1
    assert str(own.parent) in told


def test_a_link_of_one_s_own_is_followed(home, monkeypatch):
    (home / "disk").mkdir(mode=0o700)
    (home / "own").symlink_to("disk")
    monkeypatch.setenv(SWITCH, str(home / "own"))
    assert keep_programs() == home / "own"


def test_programs_that_a_kill_left_unfinished_are_dropped(home):
    """jax writes a program's time of use last; beside a program without one it would keep no other."""
    folder = keep_programs()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).touch()
    os.environ.pop(FOLDER)
    keep_programs()
    assert not (folder / "half-cache").exists()
    assert (folder / "whole-cache").exists()


BOUNDED = """
from fedvlm_jax.utils.compilation_cache import keep_programs
folder = keep_programs()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for number in range(6):
    jax.jit(lambda x: jnp.tanh(x) @ x + number)(jnp.ones((3, 3)))
print(sum(file.stat().st_size for file in folder.glob("*-cache")))
"""


def test_jax_bounds_the_folder_and_lets_the_oldest_go(tmp_path, undecided):
    """Without filelock jax would raise."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), SWITCH: str(tmp_path / "own")}

    def fill(**bound):
        run = [sys.executable, "-W", "error", "-c", BOUNDED]
        return int(subprocess.run(run, env={**environment, **bound}, capture_output=True, check=True).stdout)

    bound = 3 * fill() // 4
    shutil.rmtree(tmp_path / "own")
    assert bound // 4 < fill(JAX_COMPILATION_CACHE_MAX_SIZE=str(bound)) <= bound
    assert SETTINGS["jax_compilation_cache_max_size"] >= 2**30


@pytest.mark.parametrize("early", ["", "import jax; "])
def test_a_second_process_finds_what_the_first_compiled(tmp_path, undecided, early):
    program = f"""
{early}
from fedvlm_jax.utils.compilation_cache import keep_programs
keep_programs()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((3, 3)))
print(events.count("cache_hits") > 0, events.count("cache_misses") > 0)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [done.stdout.strip() for done in said] == ["False True", "True False"]
