"""A federated run that learns from rewards, on the tiny model: what its lines and results tell, and refusals."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_run import tiny_run

from fedvlm_jax.audit.audit_run import make_attacker
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import EvaluationOptions, PreferenceOptions, Run, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.objectives.reward import judge_answers
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model

REWARDS = PreferenceOptions(rewards=("token-f1", "brevity"), mix=(1.0, 0.0), beta=0.01, samples=4)


def make_run(model, out, **changes):
    """At a high rate, so that a few steps show."""
    train = TrainOptions(rounds=3, local_steps=2, batch_size=4, learning_rate_a=3e-2, learning_rate_b=3e-2)
    run = tiny_run(
        model, out, method="pfit", objective="reward", preference=REWARDS, train=train,
        evaluation=EvaluationOptions(every=3, max_answer_tokens=4, batch_size=6),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """-> the folder of a run, its options, the model."""
    run = make_run(model, tmp_path_factory.mktemp("runs") / "reward")
    loaded = load_model(run)
    federated_run.train(run, model=loaded)
    return run, loaded


@pytest.mark.broad
def test_lines_tell_reward_and_kl_and_results_the_held_out_reward(finished):
    run, _ = finished
    lines = read_metrics(run.out)
    assert len(lines) == 3
    for line in lines:
        assert line["kl"] >= 0
        assert 0 <= line["reward"] <= 1
        assert {"first_reward", "second_reward", "answer_tokens"} <= line.keys()
    assert lines[0]["kl"] < lines[-1]["kl"]
    assert lines[-1]["validation"]["reward"] >= 0
    results = json.loads((run.out / "results.json").read_text())
    assert results["selected_by"] == "reward"
    clients = results["zero_shot"]["test"]["reward"].keys()
    assert clients == results["personal"]["test"]["reward"].keys()
    assert len(clients) == 4


@pytest.mark.broad
def test_the_held_out_reward_is_that_of_the_client_s_mix(finished):
    """Clients 0 and 2 have the first reward alone, 1 and 3 the second alone."""
    run, loaded = finished
    settings = loaded.vlm.settings()
    eos, word = settings.eos_token_ids[0], 7
    gold, answers = np.asarray([[word, word + 1, eos]]), np.asarray([[word, eos, settings.pad_token_id]])
    found = [judge_answers(REWARDS, settings, answers, gold, client)[0] for client in range(3)]
    np.testing.assert_allclose(found, [2 / 3, 1.0, 2 / 3], rtol=1e-6)
    experiment = open_experiment(run, loaded)
    assert experiment.judge is not None
    assert open_experiment(make_run(run.model, run.out, objective="sft", method="local"), loaded).judge is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft", "preference": REWARDS}, "--preference.* means nothing to --objective sft"),
        ({"objective": "sft", "evaluation": EvaluationOptions(select_by="reward")}, "--objective sft has none"),
        ({"preference": PreferenceOptions(label_smoothing=0.1)}, "--preference.label-smoothing means nothing"),
    ],
)
def test_what_means_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(Run(objective="reward"), **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": ()}, "--preference.mix is empty"),
        ({"mix": (1.5,)}, "--preference.mix is 1.5: it must be from 0 to 1"),
        ({"samples": 1}, "--preference.samples is 1: it must be from 2 to 64"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PreferenceOptions(**options)


@pytest.mark.broad
def test_an_audit_has_no_loss_to_compare(finished):
    with pytest.raises(UserError, match="draws answers anew in every step"):
        make_attacker(open_experiment(*finished))
