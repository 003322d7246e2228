"""A decoder-only model trains, is evaluated and remembers as Florence-2 does: nothing but its own package knows it."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from make_parquet import make_row, write_rows
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.analysis.explain import explain
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import open_model
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.federated_run import resume, train
from fedvlm_jax.training.loaded_model import load_model


def toy_run(model, out, **changes):
    run = tiny_run(model, out, **changes)
    return replace(run, data=run.data.replace(max_answer_tokens=24))


@pytest.fixture(scope="module")
def finished(toy_decoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    run = toy_run(toy_decoder, out)
    return run, train(replace(run, evaluation=replace(run.evaluation, neighbours=3)))


def test_it_learns_and_is_scored_with_neighbours(finished):
    _, folder = finished
    losses = [line["loss"] for line in read_metrics(folder)]
    assert losses[-1] < losses[0]
    results = read_run(folder).results
    assert {"zero_shot", "personal"} <= results.keys()
    assert np.isfinite(list(results["personal"]["test"]["loss"].values())).all()
    resolved = read_run(folder).config["resolved"]
    assert resolved["targets"].startswith("layers/")
    assert resolved["adapted_sites"] == [f"layers/{name}_proj" for name in ("down", "k", "o", "q", "up", "v")]


@pytest.mark.slow  # what is stored of a run does not depend on its family
def test_a_stopped_run_goes_on_to_the_same_adapters(finished, tmp_path):
    run, folder = finished
    run = replace(run, evaluation=replace(run.evaluation, neighbours=3), out=tmp_path / "stopped")
    with pytest.raises(StopError):
        train(run, StopAfter(2))
    assert_same_adapters(resume(tmp_path / "stopped"), folder)


@pytest.mark.broad
def test_it_learns_preferences(toy_decoder, tmp_path):
    rows = [
        make_row(n, client="ab"[n % 2], split=("train", "train", "validation", "test")[n // 2 % 4]) for n in range(32)
    ]
    write_rows(tmp_path / "pairs.parquet", rows)
    data = make_options(source=str(tmp_path / "pairs.parquet"), max_answer_tokens=40)
    run = replace(tiny_run(toy_decoder, tmp_path / "run", objective="dpo", cohort=2), data=data)
    lines = read_metrics(train(run))
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert lines[-1]["reward_margin"] > 0


def test_prompt_and_answer_share_its_positions(toy_decoder, tmp_path):
    run = toy_run(toy_decoder, tmp_path / "run")
    short = replace(run, data=run.data.replace(max_answer_tokens=150))
    with pytest.raises(UserError, match="too long"):
        open_experiment(short, load_model(short))


def test_a_method_that_needs_an_encoder_is_refused(toy_decoder, tmp_path):
    with pytest.raises(UserError, match="iat tells encoder and decoder apart, and the model has only vision"):
        explain(toy_run(toy_decoder, tmp_path / "run", method="iat"))


def test_a_method_is_explained_on_it(toy_decoder, tmp_path):
    vlm, _ = open_model(toy_decoder)
    found = explain(toy_run(toy_decoder, tmp_path / "run", method="plora"))
    assert found.base == sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes()))
    assert {tensor.group for stage in found.stages for tensor in stage.tensors} == {
        f"layers/{name}_proj" for name in ("down", "k", "o", "q", "up", "v")
    }


def test_answers_that_take_every_position_are_refused(toy_decoder, tmp_path):
    run = toy_run(toy_decoder, tmp_path / "run")
    run = replace(run, data=run.data.replace(max_answer_tokens=1024))
    with pytest.raises(UserError, match=r"positions, and answers of up to .* leave none .*--data.max-answer-tokens"):
        open_experiment(run, load_model(run))
