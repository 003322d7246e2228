"""The compilation cache of the commands: where it is, who may say otherwise, and that programs are found in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax.runs.kept_programs import FOLDER, SWITCH, keep_programs


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


@pytest.mark.parametrize("early", ["", "import jax; "])
def test_a_second_process_finds_what_the_first_compiled(tmp_path, undecided, early):
    program = f"""
{early}
from fedvlm_jax.runs.kept_programs import keep_programs
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
