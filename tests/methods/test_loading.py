"""A method's file that says what cannot be is told so, before anything is loaded, and harms no other method."""

import sys

import jax
import pytest
from toy import RATES, make_cohort, make_method, run_round, start_states, take

import fedvlm_jax.methods.zoo
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import Run, TrainOptions
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.methods.config import LocalOptions, list_method_flags
from fedvlm_jax.reporting.method_report import tabulate_methods

GOOD = """
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.rule_based import FACTOR_B, Parts, make_share_method

def make(setup):
    if 0 < setup.local_steps < 2:
        raise UserError("mine takes turns: it needs 2 local steps")
    trained = (lambda path: path.endswith("/a"), lambda path: path.endswith("/b"))
    parts = Parts(trained=trained, phase=lambda round_: round_ % 2)
    return make_share_method("mine", "ours: A in even rounds, B in odd ones", FACTOR_B, setup, parts)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A new file `methods/zoo/NAME.py`."""
    monkeypatch.setattr(fedvlm_jax.methods.zoo, "__path__", [*fedvlm_jax.methods.zoo.__path__, str(tmp_path)])

    def write(stem, text):
        (tmp_path / f"{stem}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"fedvlm_jax.methods.zoo.{stem}", raising=False)
        list_method_flags.cache_clear()

    return write


@pytest.mark.parametrize(
    ("stem", "text", "message"),
    [
        ("without_make", "", r"methods/zoo/without_make.py defines no make\(setup\)"),
        ("misnamed", GOOD, "a method named 'mine': it must have its file's name, 'misnamed'"),
        ("mine", GOOD.replace("Parts(", "Parts(refuses={'server.mu': 'no'}, "), "server.mu; "),
        (
            "mine",
            GOOD.replace("return", "retrun"),
            r"methods/zoo/mine.py cannot be imported: SyntaxError: .*line 10\)$",
        ),
        ("mine", GOOD.replace("Parts,", "Prats,"), "methods/zoo/mine.py cannot be imported: ImportError: .*'Prats'"),
        ("with-hyphen", GOOD, "there is no methods/zoo/with_hyphen.py; a method's file is named with _ where"),
    ],
)
def test_what_a_file_must_say(write, stem, text, message):
    write(stem, text)
    with pytest.raises(UserError, match=message):
        declare(stem.replace("_", "-"), Run())


def test_a_broken_file_hides_no_other_method(write, monkeypatch):
    write("without_make", "")
    write("mistyped", "def make(setup) return setup")
    names = ("mistyped", "plora", "without-make")
    monkeypatch.setattr("fedvlm_jax.reporting.method_report.methods_available", lambda: names)
    rows = {row[0]: row[1] for row in tabulate_methods(Run()).rows}
    assert rows["mistyped"].startswith("cannot be used: methods/zoo/mistyped.py cannot be imported: SyntaxError")
    assert rows["without-make"].startswith("cannot be used: methods/zoo/without_make.py defines no make")
    assert "Σ p_k B_k" in rows["plora"]


def test_a_method_refuses_a_setup_before_loading(write):
    write("mine", GOOD)
    with pytest.raises(UserError, match="needs 2 local steps"):
        declare("mine", Run(method="mine", train=TrainOptions(local_steps=1)))
    declare("mine", Run(method="mine", train=TrainOptions(local_steps=2)))
    declare("mine", Run(method="mine", train=TrainOptions(local_epochs=1)))


def test_a_phase_that_trains_nothing_shared_is_not_held_back(write):
    """FedProx pulls on what is shared; in a round that trains A alone there is nothing of it."""
    write("mine", GOOD)
    moved = []
    for strength in (0.0, 50.0):
        _, params, trainer, method, adapter = make_method("mine", local=LocalOptions(proximal=strength))
        server = method.init(adapter=adapter)
        server["shared"] = jax.tree.map(lambda b: b + 0.1, server["shared"])  # where B is zero A has no gradient
        run = make_round(method, trainer, make_mesh(1))
        _, personal = run_round(run, params, server, make_cohort(2), [0.5, 0.5], start_states(method, server, 2))
        moved.append(personal["own"]["encoder"]["fc1"]["a"] - server["start"]["encoder"]["fc1"]["a"])
    assert abs(moved[0]).max() > 0
    assert (moved[0] == moved[1]).all()


def test_no_steps_at_all():
    _, params, trainer, _, adapter = make_method("plora")
    client = take(make_cohort(1, steps=1), 0)
    with pytest.raises(UserError, match="training of no steps"):
        trainer.run(params, adapter, trainer.start(adapter), client._replace(indices=client.indices[:0]), RATES)
