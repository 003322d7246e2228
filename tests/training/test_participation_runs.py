"""Runs in which clients of very unequal size are drawn by size, drop out and straggle."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_run import tiny_run
from training.test_federated_run import StopAfter, StopError, assert_same_adapters

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import ParticipationOptions, Run, TrainOptions, from_json, to_json
from fedvlm_jax.data.config import Quantity
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.simulator import RoundReport, Sent
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.trainer import describe_round

pytestmark = pytest.mark.broad

ALL = ParticipationOptions(sampling="size", dropout=0.5, stragglers=0.7)


def eventful_run(model, out, **changes):
    """Everything at once, fine-tuning after it too; with this seed there is a round in which nobody is left."""
    base = tiny_run(model, out)
    data = base.data.replace(partition=Quantity(clients=4, alpha=1.0), images_per_client=8)
    train = TrainOptions(rounds=4, local_epochs=2, batch_size=4, finetune_steps=5)
    return dataclasses.replace(base, cohort=3, data=data, train=train, participation=ALL, **changes)


@pytest.fixture(scope="module")
def finished(model, loaded, tmp_path_factory):
    return federated_run.train(eventful_run(model, tmp_path_factory.mktemp("runs") / "whole"), model=loaded)


def test_a_run_tells_what_became_of_its_clients(finished):
    record = read_run(finished)
    federated, finetuning = record.rounds[:4], record.rounds[4:]
    resolved = record.config["resolved"]
    assert len(set(resolved["train_examples"])) > 1
    assert resolved["steps"] == -(-2 * max(resolved["train_examples"]) // 4)
    assert all(line["clients"] == 3 for line in federated)
    assert sum(line["stragglers"] for line in federated) > 0
    empty = [line for line in federated if line["dropped"] == 3]
    assert len(empty) == 1
    assert all("loss" not in line and line["bytes_up_per_client"] == 0 for line in empty)
    assert all(line["loss"] > 0 and line["bytes_up_per_client"] > 0 for line in federated if line["dropped"] < 3)
    before = record.rounds[empty[0]["round"] - 2]
    assert empty[0]["shared_norm"] == before["shared_norm"], "the server is as it was"
    assert not any("dropped" in line or "stragglers" in line for line in finetuning)
    assert [line["clients"] for line in finetuning] == [4]
    assert [line["steps"] for line in finetuning] == [5], "everybody's, and whole"


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_never_stopped(model, loaded, finished, tmp_path, stop):
    """The same clients are drawn, drop out and straggle, so the adapters are the same bit for bit."""
    run = eventful_run(model, tmp_path / "run")
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(stop), loaded)
    federated_run.resume(run.out, model=loaded)
    assert_same_adapters(run.out, finished)
    timing = {"seconds", "clients_per_second"}
    mine, whole = (
        [{name: value for name, value in line.items() if name not in timing} for line in read_metrics(folder)]
        for folder in (run.out, finished)
    )
    assert mine == whole


def test_other_methods_meet_the_same_fate(model, loaded, finished, tmp_path):
    """`fedvlm compare` compares methods, not luck."""
    run = eventful_run(model, tmp_path / "run", method="local")
    federated_run.train(dataclasses.replace(run, train=dataclasses.replace(run.train, finetune_steps=0)), model=loaded)
    fates = [[(line["dropped"], line["stragglers"]) for line in read_metrics(f)[:4]] for f in (run.out, finished)]
    assert fates[0] == fates[1]


def test_a_line_s_means_are_over_those_who_trained():
    """Three drawn, one of them dropped out: losses 1 and 3 have the mean 2."""
    report = RoundReport(
        numbers=np.asarray([0, 4, 7]), counted=np.asarray([0, 7]), unfit=np.asarray([], int), finite=True,
        turnout={"dropped": 1, "stragglers": 1},
        metrics={"loss": np.asarray([1.0, 0.0, 3.0]), "steps": np.asarray([4.0, 0.0, 2.0])},
        selection=None, health={"shared_norm": 5.0}, bytes_up=8, bytes_down=9, trained=None, base={},
        sent=Sent({}, np.asarray([0.5, 0, 0.5]), {}),
    )  # fmt: skip
    line = describe_round(6, "plora", report, 2.0)
    assert (line["clients"], line["dropped"], line["stragglers"]) == (3, 1, 1)
    assert (line["loss"], line["steps"], line["shared_norm"]) == (2.0, 3.0, 5.0)
    nobody = dataclasses.replace(report, metrics=jax.tree.map(np.zeros_like, report.metrics))
    assert not {"loss", "steps"} & describe_round(6, "plora", nobody, 2.0).keys()


# --- Options ---


def test_json_brings_back_the_same_run(tmp_path):
    run = eventful_run(tmp_path, tmp_path)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    validate(dataclasses.replace(run, model="florence2-nano", out=None))
    validate_comparison(Compare(base=Run(cohort=3, participation=ALL, train=TrainOptions(local_epochs=0.5))))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run(participation=ParticipationOptions(dropout=1.0)), "--participation.dropout is 1.0"),
        (Run(participation=ParticipationOptions(dropout=-0.1)), "--participation.dropout is -0.1"),
        (Run(participation=ParticipationOptions(dropout=float("nan"))), "--participation.dropout is nan"),
        (Run(participation=ParticipationOptions(stragglers=1.5)), "--participation.stragglers is 1.5"),
        (Run(participation=ParticipationOptions(sampling="size")), "without --cohort everybody takes part"),
        (
            Run(participation=ParticipationOptions(stragglers=0.5), train=TrainOptions(local_steps=1)),
            "fewer steps than --train.local-steps 1",
        ),
        (Run(train=TrainOptions(local_epochs=0)), "--train.local-epochs is 0"),
        (Run(train=TrainOptions(local_epochs=float("inf"))), "--train.local-epochs is inf"),
        (Run(train=TrainOptions(local_epochs=2, local_steps=8)), "--train.local-steps 8 exclude each other"),
    ],
)
def test_what_cannot_work_is_refused(run, expected):
    with pytest.raises(UserError, match=expected):
        validate(run)
