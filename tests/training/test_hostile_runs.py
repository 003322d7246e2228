"""Runs with attackers and robust rules, from their options to their report."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.inputs.poisoned_rows import mark_pictures
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.reporting.report import write_report
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.federated_run import resume, train
from fedvlm_jax.training.loaded_model import load_model


@pytest.fixture(scope="module")
def loaded(model, tmp_path_factory):
    return load_model(tiny_run(model, tmp_path_factory.mktemp("unused")))


def make_run(model, out, attack="backdoor", attackers=1, **messages) -> Run:
    run = tiny_run(model, out, cohort=4, participation=ParticipationOptions(attack=attack, attackers=attackers))
    return dataclasses.replace(run, messages=MessageOptions(**messages), train=dataclasses.replace(run.train, rounds=2))


@pytest.fixture(scope="module")
def finished(model, loaded, tmp_path_factory):
    return train(make_run(model, tmp_path_factory.mktemp("run") / "r", pool="trimmed"), model=loaded)


@pytest.mark.broad
def test_scores_and_means_are_those_of_honest_clients(finished):
    record = read_run(finished)
    (attacker,) = record.attackers
    names = set(record.config["resolved"]["clients"])
    for model in ("zero_shot", "personal"):
        for split in ("validation", "test"):
            assert record.results[model][split]["loss"].keys() == names - {attacker}
    attack = record.results["attack"]
    assert attack["kind"] == "backdoor"
    assert attack["target"]
    assert set(attack["with_mark"]) <= names - {attacker}
    assert attack["with_mark"].keys() == attack["without_mark"].keys()
    assert all(0 <= rate <= 1 for rate in attack["with_mark"].values())


@pytest.mark.broad
def test_every_round_says_whose_updates_were_taken(finished):
    record, lines = read_run(finished), read_metrics(finished)
    names = set(record.config["resolved"]["clients"])
    assert record.answer_distances.keys() == names
    for line in lines:
        assert line["pool"] == "trimmed"
        assert line["pool_withstands"] == 1
        assert line["selection"].keys() == names
        assert all(0 <= value <= 1 for value in line["selection"].values())
        # Of four values of an entry two are kept, or more where they are equal.
        assert np.mean(list(line["selection"].values())) >= 0.5 - 1e-3
        assert line["left_out"] == [name for name, value in line["selection"].items() if value == 0]


@pytest.mark.broad
def test_the_report_tells_of_attackers_and_marks_them(finished):
    page = write_report([finished]).read_text(encoding="utf-8")
    record = read_run(finished)
    assert "Hostile and unusual clients" in page
    assert f"Simulated attackers (backdoor): {record.attackers[0]}" in page
    assert "The backdoor" in page
    assert "cannot tell an attacker from a client whose data are unusual" in page
    assert (finished / "figures" / "selection.png").is_file()


@pytest.mark.broad
def test_a_run_under_attack_that_is_stopped_goes_on_to_the_same_end(model, loaded, finished, tmp_path):
    run = make_run(model, tmp_path / "r", pool="trimmed")
    with pytest.raises(StopError):
        train(run, StopAfter(1), model=loaded)
    resume(tmp_path / "r", model=loaded)
    assert_same_adapters(finished, tmp_path / "r")
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path / "r"))
    assert first["attack"] == second["attack"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attackers": 4}, "--participation.attackers 4: there are 4 clients that train"),
        ({"pool": "krum", "hostile": 1}, "--messages.pool krum needs 5 clients in a round .* there are 4"),
    ],
)
def test_more_than_there_are_is_refused_before_training(model, loaded, tmp_path, changes, expected):
    run = dataclasses.replace(make_run(model, tmp_path / "r", attack="scale", **changes), cohort=None)
    with pytest.raises(UserError, match=expected):
        open_experiment(run, loaded)


def test_attackers_are_the_same_for_all_attacks_and_train_on_other_rows(model, loaded, tmp_path):
    runs = {kind: make_run(model, tmp_path / "r", attack=kind) for kind in ("none", "scale", "label-flip", "backdoor")}
    experiments = {kind: open_experiment(run, loaded) for kind, run in runs.items()}
    (number,) = experiments["none"].attackers
    assert {experiment.attackers for experiment in experiments.values()} == {(number,)}
    examples = experiments["none"].examples
    hostile, honest = (examples.clients[n].train for n in (number, (number + 1) % 4))
    plain = experiments["none"].inputs
    for kind in ("none", "scale"):
        assert experiments[kind].trained_inputs(hostile)["labels"].tolist() == plain(hostile)["labels"].tolist()
    flipped, opened = (experiments[kind].trained_inputs for kind in ("label-flip", "backdoor"))
    assert (flipped(hostile)["labels"] != plain(hostile)["labels"]).any(axis=1).all()
    changed = (opened(hostile)["image_features"] != plain(hostile)["image_features"]).any(axis=(1, 2))
    assert changed.sum() == experiments["backdoor"].backdoor.marked.sum() == -(-len(hostile) // 2)
    # Marked pictures are further rows of the store, by keys of their own.
    assert set(mark_pictures(examples).views.keys).isdisjoint(examples.views.keys)
    for inputs in (flipped, opened):
        for name, array in plain(honest).items():
            np.testing.assert_array_equal(inputs(honest)[name], array)


def test_with_pixels_a_backdoor_marks_the_pictures_themselves(model, loaded, tmp_path):
    run = make_run(model, tmp_path / "r")
    run = dataclasses.replace(run, system=dataclasses.replace(run.system, cache="off"))
    experiment = open_experiment(run, loaded)
    rows = experiment.examples.clients[experiment.attackers[0]].train
    plain, opened = experiment.inputs(rows)["pixel_values"], experiment.trained_inputs(rows)["pixel_values"]
    changed = (plain != opened).any(axis=-1)
    assert changed.any(axis=(1, 2)).sum() == -(-len(rows) // 2)
    assert not changed[:, : plain.shape[1] // 2].any()


@pytest.mark.parametrize("seed", [1, 2])
def test_who_attacks_is_drawn_among_clients_that_train(model, loaded, tmp_path, seed):
    run = make_run(model, tmp_path / "r", attack="scale", attackers=2)
    data = make_options(
        languages=("en", "de"), vendors=("noto", "fluent"), images_per_client=5, validation_per_client=2,
        test_per_client=3, held_out_clients=0.25,
    )  # fmt: skip
    experiment = open_experiment(dataclasses.replace(run, data=data, seed=seed, cohort=None), loaded)
    assert len(experiment.attackers) == 2
    assert all(experiment.examples.clients[number].trains for number in experiment.attackers)
    assert set(experiment.judged) == set(experiment.scored) - set(experiment.attackers)
