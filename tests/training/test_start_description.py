"""What a run's config.json says of its adapter is what the run's method trains, and what `fedvlm explain` shows."""

import dataclasses
import functools

import jax
import pytest
from methods.test_contract import each
from tiny_run import tiny_run

from fedvlm_jax.analysis.explain import explain_method
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.method_setup import make_method, make_spec
from fedvlm_jax.config.run_options import LoraOptions, Run, TrainOptions, methods_available
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.simulator import start_adapter
from fedvlm_jax.methods.zoo import feddpa_t, pftt
from fedvlm_jax.models import read_vlm
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.round_setup import build_programs
from fedvlm_jax.training.start_description import describe_adapter
from fedvlm_jax.utils.progress import SilentProgress

CLIENTS, STEPS = 4, 3
read_model = functools.cache(read_vlm)


def make_run(name, **choices):
    choices = {"train": TrainOptions(rounds=4, local_steps=STEPS, batch_size=2), **choices}
    run = Run(method=name, lora=LoraOptions(rank=2), **choices)
    if not declare(name, run).classes:
        return run
    form = LoraOptions(rank=2) if declare(name, run).parallel else LoraOptions()
    return dataclasses.replace(run, model="clip-nano", lora=form)


def describe(run):
    """What a run says of its adapter, by its own method and without data."""
    vlm = read_model(run.model)
    programs = build_programs(vlm, make_mesh(1), run, CLIENTS, CLIENTS, CLIENTS, run.train.local_steps)
    adapter = jax.eval_shape(lambda key: start_adapter(key, vlm.sites, make_spec(run, vlm)), jax.random.key(0))
    return describe_adapter(adapter, programs.method, vlm, run.train, run.train.local_steps)["adapter_parameters"]


@pytest.mark.parametrize("name", each(methods_available()))
def test_a_run_says_what_explain_shows(name):
    run = make_run(name)
    explained = explain_method(read_model(run.model), run, CLIENTS, lambda setup: make_method(run, setup))
    assert describe(run) == max(stage.trained for stage in explained.stages) > 0


@pytest.mark.broad
def test_by_hand():
    """Of CLIP-nano 128 numbers wide: 4 vectors; what attention over 128 has; r × r with its bias beside two layers."""
    width, prompt = 128, 4 * 128
    assert describe(make_run("promptfl")) == prompt
    assert describe(make_run("fedotp")) == 2 * prompt
    assert describe(make_run("pfedmoap")) == prompt + 4 * (width * width + width)


@pytest.mark.broad
def test_rounds_that_come_and_steps_that_there_are_count():
    whole = feddpa_t.Options(whole=True)
    once, twice = (
        describe(make_run("feddpa-t", method_options=whole, train=TrainOptions(rounds=rounds))) for rounds in (1, 2)
    )
    assert twice == 2 * once == 2 * describe(make_run("feddpa-t", train=TrainOptions(local_steps=1)))
    widths = [describe(make_run("pftt", method_options=pftt.Options(width=width))) for width in (4, 8, 12)]
    assert widths[2] - widths[1] == widths[1] - widths[0] > 0


def test_rounds_that_never_come_are_told_before_training(model, loaded):
    for rounds, told in ((2, 1), (3, 0)):
        train = TrainOptions(rounds=rounds, local_steps=2, batch_size=4)
        show = SilentProgress()
        open_experiment(tiny_run(model, None, method="fedlease", train=train), loaded, show)
        assert sum("fedlease trains no cluster's expert" in note for note in show.notes) == told


@pytest.mark.broad
def test_explain_tells_them_too(capsys):
    main(["explain", "hilora", "--train.rounds", "2"])
    assert "in 2 rounds hilora trains no leaf: the root's stage has 1 round" in capsys.readouterr().out
