"""From options to a method's setup."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from toy import WRITES

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_setup import make_method
from fedvlm_jax.config.run_options import LoraOptions, Run, TrainOptions
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import choose_layout
from fedvlm_jax.methods.components.personalized_download import start_pool
from fedvlm_jax.methods.config import LocalOptions, ServerOptions
from fedvlm_jax.methods.zoo import ditto, pfit, pftt
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.training import compare, round_setup


@pytest.mark.parametrize(("wave", "places"), [(20, 20), (12, 24), (8, 24)])
def test_a_pool_has_room_for_the_cohort_however_it_is_laid_out(monkeypatch, wave, places):
    """Of 40 clients 20 a round: places beyond them are nobody's, and depend on the devices."""
    made = []
    monkeypatch.setattr(round_setup, "make_method", lambda run, setup: made.append(setup) or make_method(run, setup))
    layout = choose_layout([9] * 40, cohort=20, wave=wave, devices=1, steps=2, batch=2)
    known = {"sites": {}, "targets": "x", "components": {}, "component": lambda path: None}
    run, vlm = Run(method="fedalt"), SimpleNamespace(**known, **WRITES)
    round_setup.build_programs(vlm, make_mesh(1), run, 40, layout.cohort, layout.places, layout.steps)
    (setup,) = made
    assert (setup.cohort, setup.places) == (20, places)
    assert len(start_pool({"b": jnp.zeros(1)}, setup)["number"]) == 20


@pytest.mark.parametrize("train", [{"local_steps": 2**31 - 1}, {"batch_size": 2**31 - 1}, {"local_epochs": 1e9}])
def test_a_round_of_more_rows_than_can_be_listed_is_refused(train):
    run = Run(train=TrainOptions(**train))
    with pytest.raises(UserError, match=r"a round would take [\d,]+ rows \(2 clients"):
        round_setup.lay_out_sizes(run, [9, 9], make_mesh(1), None, None)


CHANGES = {
    "method": Run(method="fedsa-lora"),
    "numbers": Run(method="ditto", method_options=ditto.Options(lambda_=0.7)),
    "objective": Run(objective="sft+dpo"),
    "preference": Run(objective="dpo", preference=PreferenceOptions(beta=0.7)),
    "dropout": Run(lora=LoraOptions(dropout=0.1)),
    "rank": Run(lora=LoraOptions(rank=2)),
    "ranks": Run(lora=LoraOptions(rank=2, ranks=(1, 2))),
    "private_a": Run(lora=LoraOptions(private_a="per-client")),
    "local": Run(local=LocalOptions(proximal=0.1)),
    "server": Run(server=ServerOptions(optimizer="adam", learning_rate=0.01)),
    "optimizer": Run(train=TrainOptions(optimizer="sgd")),
    "weight_decay": Run(train=TrainOptions(weight_decay=0.3)),
    "clip_norm": Run(train=TrainOptions(clip_norm=3.0)),
    "optimizer_state": Run(train=TrainOptions(optimizer_state="fresh")),
    "rounds": Run(train=TrainOptions(rounds=77)),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_no_option_that_programs_depend_on_is_put_at_its_default(monkeypatch, changed):
    """Objective, local training and method are made of the same, from a run's options and from those chosen of them."""
    monkeypatch.setattr(round_setup, "load_objective", lambda name, preference: (name, preference))
    monkeypatch.setattr(round_setup, "make_method", lambda run, setup: (run.method, setup))
    monkeypatch.setattr(round_setup, "Programs", lambda method, trainer, *_: (method, trainer.options))

    def make_local_trainer(vlm, objective, **options):
        return SimpleNamespace(start=None, options=(objective, options))

    monkeypatch.setattr(round_setup, "make_local_trainer", make_local_trainer)
    vlm = SimpleNamespace(sites={}, targets="", components={}, component=str, **WRITES)

    def make(run):
        return round_setup.build_programs(vlm, None, run, clients=4, cohort=2, places=2, steps=3)

    run = CHANGES[changed]
    assert make(run) == make(round_setup.choose_program_options(run))
    assert make(run) != make(Run())


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        ("pfedmma", {}, "--method pfedmma is for models that choose among classes"),
        ("pftt", {"pftt": pftt.Options(after="nowhere$")}, r"--method.after 'nowhere\$': no site matches"),
        ("pfit", {"pfit": pfit.Options(layers="nowhere")}, "--method.layers 'nowhere' is found in no adapter's path"),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused_before_another_trains(
    method, numbers, message, monkeypatch, tmp_path
):
    """The methods before it would have trained for hours."""
    monkeypatch.setattr(compare, "load_model", lambda *_: pytest.fail("weights were read"))
    comparison = Compare(methods=("local", method), method_options=numbers, base=Run(out=tmp_path / "out"))
    with pytest.raises(UserError, match=message):
        compare.compare(comparison)
    assert not (tmp_path / "out" / "runs").exists()
