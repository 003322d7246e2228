"""The examples that a run stores: chosen without chance, among the answers that were scored."""

import dataclasses
import json

import numpy as np
import pytest
from make_parquet import make_rows, write_rows
from PIL import Image
from tiny_run import tiny_run

from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.training import example_outputs, federated_run

TRAIN = TrainOptions(rounds=1, local_steps=2, batch_size=4)


def run_with(model, folder, loaded, method="plora", **evaluation):
    run = tiny_run(model, folder, method=method, train=TRAIN)
    return federated_run.train(
        dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, **evaluation)), model=loaded
    )


def read(folder):
    return json.loads((folder / "examples.json").read_text())["examples"]


@pytest.mark.broad
def test_a_run_stores_examples_with_every_model_s_answer(model, loaded, tmp_path):
    folder = run_with(model, tmp_path / "run", loaded, examples=6)
    told = read(folder)
    assert [entry["client"] for entry in told] == ["noto-en"] * 2 + ["noto-de"] * 2 + ["fluent-en", "fluent-de"]
    assert len(told) == 6
    assert len({entry["row"] for entry in told}) == 6
    for entry in told:
        assert set(entry["answers"]) == {"zero_shot", "global", "personal"}
        assert entry["question"]
        assert entry["answer"]
        with Image.open(folder / entry["picture"]) as picture:
            assert max(picture.size) <= 176


def test_the_answers_are_those_that_were_scored(model, loaded, tmp_path):
    """One test example a client, so that a client's score is its example's."""
    run = tiny_run(model, tmp_path / "run", train=TRAIN)
    run = dataclasses.replace(run, data=run.data.replace(test_per_client=1, tasks=run.data.tasks[:1]))
    folder = federated_run.train(run, model=loaded)
    results = json.loads((folder / "results.json").read_text())
    told = read(folder)
    assert [entry["client"] for entry in told] == list(results["personal"]["test"]["token_f1"])
    for entry in told:
        for name, answer in entry["answers"].items():
            for metric in ("exact_match", "token_f1"):
                assert answer[metric] == pytest.approx(results[name]["test"][metric][entry["client"]])


@pytest.mark.slow  # that the two models score alike is a broad test, see test_final_evaluation.py
def test_where_nothing_is_private_the_global_model_answers_as_the_personal_one(model, loaded, tmp_path):
    for entry in read(run_with(model, tmp_path / "run", loaded, method="fedavg-lora")):
        assert entry["answers"]["global"] == entry["answers"]["personal"]
    for entry in read(run_with(model, tmp_path / "local", loaded, method="local")):
        assert set(entry["answers"]) == {"zero_shot", "personal"}


def test_none_are_stored_where_none_are_asked_for_or_test_is_left_alone(model, loaded, tmp_path):
    for name, options in (("none", {"examples": 0}), ("tuning", {"test": False})):
        folder = run_with(model, tmp_path / name, loaded, **options)
        assert not (folder / "examples.json").exists()
        assert not (folder / "examples").exists()


@pytest.mark.slow
def test_parquet_too(model, tmp_path):
    write_rows(tmp_path / "rows.parquet", make_rows(40))
    data = make_options(source=str(tmp_path / "rows.parquet"))
    folder = federated_run.train(tiny_run(model, tmp_path / "run", data=data, cohort=None, train=TRAIN))
    told = read(folder)
    assert 0 < len(told) <= 12
    assert all((folder / entry["picture"]).is_file() for entry in told)


@pytest.mark.parametrize(
    ("right", "wanted", "share", "numbers"),
    [
        ("+--- +---", (2, 2), 0.25, [1, 0]),
        ("++-- ++--", (2, 2), 0.5, [1, 1]),
        ("++++ ----", (2, 2), 0.5, [2, 0]),  # one has nothing but right ones, the other none
        ("++++ +---", (2, 2), 0.75, [2, 1]),
        ("---- ----", (2, 2), 0.9, [0, 0]),
        ("++++ ++++", (2, 1), 0.0, [2, 1]),
        ("+- +-", (3, 3), 0.5, [1, 1]),  # fewer candidates than wanted
    ],
)
def test_as_many_are_right_as_the_accuracy_has(right, wanted, share, numbers):
    flags = [np.array([sign == "+" for sign in own]) for own in right.split()]
    assert example_outputs.share_out_right(flags, wanted, share) == numbers


def test_the_first_of_each_kind_in_their_order():
    right = np.array([False, True, False, True, True])
    assert example_outputs._first_of_each(right, 2, 3) == [0, 1, 3]
    assert example_outputs._first_of_each(right, 0, 3) == [0, 2]


def test_too_many_for_a_page_are_refused(model, tmp_path):
    run = tiny_run(model, tmp_path)
    options = dataclasses.replace(run.evaluation, examples=49)
    with pytest.raises(UserError, match=r"--evaluation\.examples is 49: it must be a whole number of at most 48"):
        validate(dataclasses.replace(run, evaluation=options))
