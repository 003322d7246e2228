"""The scripts outside the package use what there is in it, and what they measure is what they say."""

import ast
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import population
import pytest
from harness.command import name_command
from harness.shipped import measure_simulator

from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.methods import Client

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(file for folder in ("benchmarks", "experiments", "tools") for file in (ROOT / folder).rglob("*.py"))


def list_imports(file):
    """What a script imports of ours, here or in its functions: (module, name or nothing)."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from (pair for pair in found if pair[0].partition(".")[0] in ("fedvlm_jax", "harness"))


def is_there(module, name):
    imported = importlib.import_module(module)
    return not name or hasattr(imported, name) or importlib.util.find_spec(f"{module}.{name}") is not None


def test_scripts_import_what_there_is():
    """Also those that need what is not installed here."""
    wanted = {pair: file for file in SCRIPTS for pair in list_imports(file)}
    assert len(wanted) > 50
    assert [f"{file.name}: {pair}" for pair, file in wanted.items() if not is_there(*pair)] == []


@pytest.fixture
def cut_base(monkeypatch):
    """A script that asks for eight devices when it is imported: not of the tests that come after it."""
    jax.devices()
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return importlib.import_module("cut_base")


def test_a_client_of_the_cut_base_has_all_its_fields(cut_base):
    client = cut_base.make_client()
    assert isinstance(client, Client)
    assert client.examples["labels"].shape == (cut_base.ROWS, cut_base.ANSWER)
    assert client.indices.shape == client.mask.shape == (cut_base.STEPS, cut_base.BATCH)


def test_a_population_is_one_of_so_many_clients():
    run = population.make_run(population.Options(serve=200))
    validate(run)
    assert (run.cohort, run.data.partition.clients) == (16, 200)


def test_a_script_s_command_has_its_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/startup.py", "--starts", "2", "--train=--data.limit 3"])
    assert name_command() == "python benchmarks/startup.py --starts 2 '--train=--data.limit 3'"


class Rounds:
    """A simulator whose rounds call one compiled program and the one of the diagnostics."""

    def __init__(self):
        self.programs = SimpleNamespace(health=lambda: 0, compiled={"round": lambda: 0})
        self.server = 0
        self.read = []

    def read_round(self, number):
        return number

    def run_round(self, read, rates):
        assert set(rates) == {"a", "b"}
        self.read.append(read)
        self.programs.health()
        self.programs.compiled["round"]()
        jax.jit(lambda x: x + 1)(read)  # a new function: compiled in every round


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_a_simulator_leaves_its_programs_as_they_are(fails):
    """Other simulators share them."""
    simulator = Rounds()
    programs, compiled = simulator.programs, dict(simulator.programs.compiled)
    before = dict(vars(programs))
    if fails:
        simulator.run_round = lambda read, rates: 1 / 0
        with pytest.raises(ZeroDivisionError):
            measure_simulator(simulator, rounds=3)
    else:
        found = measure_simulator(simulator, rounds=3)
        assert simulator.read == [1, 2, 3]
        assert 0 < found["host_share"] <= 1
        assert found["compiles"] == {"rounds": 3, "programs_of_the_round": 1, "later": 2}
    assert simulator.programs is programs
    assert vars(programs) == before
    assert programs.compiled == compiled
