"""Comparisons on a tiny model: settings per method, and fine-tuning that continues a run instead of repeating it."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_run import read_adapters, tiny_run

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import read_comparison, read_metrics, read_run
from fedvlm_jax.training import compare as comparing
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.evaluate import evaluate
from fedvlm_jax.utils.progress import SilentProgress

TIMING = {"seconds", "clients_per_second"}


pytestmark = pytest.mark.broad


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    run = tiny_run(model, tmp_path_factory.mktemp("unused") / "none")
    return dataclasses.replace(run, train=dataclasses.replace(run.train, rounds=2))


@pytest.fixture(scope="module")
def methods():
    return ("fedavg-lora+ft", "local", "fedavg-lora")


@pytest.fixture(scope="module")
def show():
    return SilentProgress()


@pytest.fixture(scope="module")
def rates(base):
    return dataclasses.replace(base.train, learning_rate_a=1e-3)


@pytest.fixture(scope="module")
def folder(base, loaded, methods, show, rates, tmp_path_factory):
    base = dataclasses.replace(base, out=tmp_path_factory.mktemp("comparisons") / "one")
    comparison = Compare(methods=methods, seeds=1, finetune_steps=3, base=base)
    return comparing.compare(comparison, show, loaded, settings={"local": rates})


def test_every_method_has_its_own_settings(folder, base, rates):
    stored = json.loads((folder / "comparison.json").read_text())["train"]
    assert stored["local"]["learning_rate_a"] == rates.learning_rate_a
    assert stored["fedavg-lora"]["learning_rate_a"] == base.train.learning_rate_a
    assert [stored[method]["finetune_steps"] for method in stored] == [3, 0, 0]
    for run in read_comparison(folder).runs:
        assert read_run(folder / run["folder"]).options["train"] == stored[run["method"]]


def test_the_order_of_methods_is_the_one_asked_for(folder, methods):
    assert [run["method"] for run in read_comparison(folder).runs] == list(methods)


def test_fine_tuning_does_not_repeat_the_federation(folder, show):
    rounds = [(line["method"], line["round"]) for line in show.lines]
    assert sorted(rounds) == [("fedavg-lora", 1), ("fedavg-lora", 2), *(("local", n) for n in (1, 2, 3, 4))]


def test_a_continued_run_is_a_run_of_its_own(folder, base, loaded, tmp_path):
    """Bit for bit what it would have been without the run that it continues."""
    continued = read_run(folder / "runs" / "fedavg-lora+ft-seed1")
    train = dataclasses.replace(base.train, finetune_steps=3)
    alone = read_run(
        federated_run.train(
            dataclasses.replace(base, method="fedavg-lora", train=train, out=tmp_path / "run"), None, loaded
        )
    )
    assert continued.results == alone.results
    assert continued.config["resolved"] == alone.config["resolved"]
    assert {**continued.options, "out": None} == {**alone.options, "out": None}
    untimed = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in record.rounds] for record in (continued, alone)
    ]
    assert untimed[0] == untimed[1]
    one, two = read_adapters(continued.folder), read_adapters(alone.folder)
    assert len(one) == 6, "four clients', the shared part, and a global model"
    assert one.keys() == two.keys()
    for name, arrays in one.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, two[name][path], err_msg=f"{name} {path}")


def test_a_repeated_comparison_reads_what_is_there(folder, base, loaded, methods, rates):
    lines = len(read_metrics(folder / "runs" / "local-seed1"))
    before = (folder / "comparison.json").read_text()
    rest = SilentProgress()
    base = dataclasses.replace(base, out=folder)
    comparison = Compare(methods=methods, seeds=1, finetune_steps=3, base=base)
    comparing.compare(comparison, rest, loaded, settings={"local": rates})
    assert rest.lines == []
    assert len(read_metrics(folder / "runs" / "local-seed1")) == lines
    assert json.loads((folder / "comparison.json").read_text())["runs"] == json.loads(before)["runs"]


def test_other_settings_in_the_same_folder_are_refused(folder, base, loaded, methods):
    base = dataclasses.replace(base, out=folder)
    comparison = Compare(methods=methods, seeds=1, finetune_steps=3, base=base)
    with pytest.raises(UserError, match="local-seed1 was made with other options"):
        comparing.compare(comparison, None, loaded)


def test_settings_of_a_method_that_is_not_compared(base, loaded, tmp_path):
    comparison = Compare(methods=("local",), seeds=1, base=dataclasses.replace(base, out=tmp_path))
    with pytest.raises(UserError, match="settings for plora, which is not compared: there are local"):
        comparing.compare(comparison, None, loaded, settings={"plora": base.train})


def test_a_method_that_the_model_cannot_have_is_refused_before_another_is_run(base, loaded, tmp_path, monkeypatch):
    comparison = Compare(methods=("local", "promptfl"), seeds=1, base=dataclasses.replace(base, out=tmp_path / "out"))
    monkeypatch.setattr(comparing, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for model in (None, loaded):
        with pytest.raises(UserError, match=r"--method promptfl trains a soft prompt .*: say --model clip-nano"):
            comparing.compare(comparison, None, model)
    assert not (tmp_path / "out").exists()


def test_a_run_is_continued_by_its_own_fine_tuning_only(folder, base, loaded, tmp_path):
    train = dataclasses.replace(base.train, finetune_steps=3, learning_rate_b=1e-4)
    run = dataclasses.replace(base, method="fedavg-lora", train=train, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"differs from .* in more than local fine-tuning or neighbours"):
        federated_run.extend(folder / "runs" / "fedavg-lora-seed1", run, None, loaded)


def test_the_test_split_can_be_left_alone(base, loaded, tmp_path):
    evaluation = dataclasses.replace(base.evaluation, test=False)
    run = dataclasses.replace(base, method="local", evaluation=evaluation, out=tmp_path / "run")
    record = read_run(federated_run.train(run, None, loaded))
    assert set(record.results["personal"]) == set(record.results["zero_shot"]) == {"validation"}
    assert record.scores("personal") == {}


def test_what_clients_had_before_redistribution_can_be_left_out(folder, base, loaded, tmp_path):
    evaluation = dataclasses.replace(base.evaluation, before_redistribution=False)
    run = dataclasses.replace(base, method="fedavg-lora", evaluation=evaluation, out=tmp_path / "run")
    record = read_run(federated_run.train(run, None, loaded))
    whole = read_run(folder / "runs" / "fedavg-lora-seed1")
    assert "before_redistribution" in whole.rounds[-1]["validation"]
    assert "before_redistribution" not in record.rounds[-1]["validation"]
    assert record.results == whole.results


@pytest.fixture(scope="module")
def remembering(base, loaded, tmp_path_factory):
    """Rounds that were run, and the folder, of a comparison in which neighbours follow a federation."""
    show = SilentProgress()
    base = dataclasses.replace(base, out=tmp_path_factory.mktemp("comparisons") / "knn")
    comparison = Compare(methods=("plora+knn", "plora"), seeds=1, neighbours=2, base=base)
    return show.lines, comparing.compare(comparison, show, loaded)


def test_neighbours_do_not_repeat_the_federation(remembering):
    lines, folder = remembering
    assert [(line["method"], line["round"]) for line in lines] == [("plora", 1), ("plora", 2)]
    record = read_comparison(folder)
    assert [run["method"] for run in record.runs] == ["plora+knn", "plora"]
    assert {run["bytes_up_per_client"] for run in record.runs} == {record.runs[0]["bytes_up_per_client"]}


def test_neighbours_change_what_is_said_and_not_what_was_learnt(remembering):
    _, folder = remembering
    plain, mixed = (read_run(folder / "runs" / f"{name}-seed1") for name in ("plora", "plora+knn"))
    assert mixed.method == "plora+knn"
    assert set(mixed.results["neighbours"]["share"]) == set(mixed.scores("personal"))
    assert "neighbours" not in plain.results
    assert mixed.scores("personal", "loss", "validation") != plain.scores("personal", "loss", "validation")
    assert mixed.results["zero_shot"] == plain.results["zero_shot"]
    assert mixed.results["global"] == plain.results["global"]
    for name, share in mixed.results["neighbours"]["share"].items():
        own, other = (record.scores("personal", "loss", "validation")[name] for record in (mixed, plain))
        assert own <= other + 1e-5, (name, share)  # by choice: no neighbours were among what was tried
    one, two = (read_adapters(record.folder) for record in (plain, mixed))
    for name, arrays in one.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, two[name][path], err_msg=f"{name} {path}")


def test_a_stored_run_remembers_again(remembering):
    """`fedvlm evaluate` builds the memory anew from the training data and finds the same numbers."""
    _, folder = remembering
    record = read_run(folder / "runs" / "plora+knn-seed1")
    again = evaluate(record.folder)
    assert again["neighbours"] == record.results["neighbours"]
    for metric, values in record.results["personal"]["test"].items():
        assert again["personal"]["test"][metric] == pytest.approx(values, rel=1e-5, abs=1e-6), metric


def test_neighbours_are_asked_for_by_name(base, loaded, tmp_path):
    base = dataclasses.replace(base, out=tmp_path, evaluation=dataclasses.replace(base.evaluation, neighbours=2))
    with pytest.raises(UserError, match=r'here add "\+knn" to a method'):
        comparing.compare(Compare(methods=("plora",), seeds=1, base=base), None, loaded)
