"""A federated run that learns from rewards, on the tiny model: what its lines and results tell, and refusals."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import StopAfter, StopError, tiny_run

from fedvlm_jax.audit.audit_run import make_attacker
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import EvaluationOptions, PreferenceOptions, Run, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.objectives.reward import find_frame, judge_answers
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.compare import refuse_other_sources
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.digests import digest_file

CIDER = PreferenceOptions(rewards=("cider", "brevity"))
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


@pytest.fixture
def listed(tmp_path):
    """-> model -> a run whose rewards are a file's and CIDEr; its file."""

    def make(model):
        file = tmp_path / "rewards.jsonl"
        lines = [
            {"answer": "bus", "reward": 0.75, "client": "noto-en"},
            {"answer": "bus", "reward": 0},
            {"reward": 0.5},
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rewards = dataclasses.replace(REWARDS, rewards=("file", "cider"), reward_file=file)
        train = TrainOptions(rounds=2, local_steps=2, batch_size=4)
        return make_run(model, tmp_path / "run", preference=rewards, train=train), file

    return make


@pytest.mark.broad
def test_a_run_with_a_file_and_cider_is_gone_on_with_while_its_file_is_the_same(finished, listed, tmp_path):
    run, file = listed(finished[0].model)
    loaded = finished[1]
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(1), loaded)
    before = file.read_text()
    file.write_text(before.replace("0.75", "0.7"))
    with pytest.raises(UserError, match=rf"the file of rewards, {file}, is gone or has another content"):
        federated_run.resume(run.out, model=loaded)
    file.write_text(before)
    federated_run.resume(run.out, model=loaded)
    for line in read_metrics(run.out):
        assert line["first_reward"] == pytest.approx(0.5)  # nothing listed is drawn by chance
        assert 0 <= line["second_reward"] < 1
    results = json.loads((run.out / "results.json").read_text())
    config = json.loads((run.out / "config.json").read_text())
    assert config["fingerprint"]["rewards"] == digest_file(file)
    of_first = [results["personal"]["test"]["reward"][name] for name in config["resolved"]["clients"][::2]]
    assert of_first == pytest.approx([0.5, 0.5])  # clients 0 and 2 have the file's alone

    experiment = open_experiment(run, loaded)
    clients, judge, settings = experiment.examples.clients, experiment.judge, loaded.vlm.settings()
    assert clients[0].name == "noto-en"
    assert judge is not None
    said = np.where((labels := loaded.processor.answers(["bus"], 8)) < 0, settings.pad_token_id, labels)
    assert [judge(said, clients[number].test[:1], number)[0] for number in (0, 2)] == [0.75, 0.0]
    rows = clients[1].test
    gold = np.where((labels := experiment.examples.labels[rows]) < 0, settings.pad_token_id, labels)
    tokens = (labels >= 0).sum(axis=1) - np.isin(labels, find_frame(settings)).sum(axis=1)
    np.testing.assert_allclose(judge(gold, rows, 1), np.minimum(tokens, 4) / 4, rtol=1e-5)  # all orders that it has

    refuse_other_sources(run.out, run, loaded)  # which a comparison asks of runs that are finished
    file.write_text(before.replace("0.75", "0.7"))
    with pytest.raises(UserError, match=r"the file of rewards, .*, is gone or has another content"):
        refuse_other_sources(run.out, run, loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft", "preference": REWARDS}, "--preference.* means nothing to --objective sft"),
        ({"objective": "sft", "evaluation": EvaluationOptions(select_by="reward")}, "--objective sft has none"),
        ({"preference": PreferenceOptions(label_smoothing=0.1)}, "--preference.label-smoothing means nothing"),
        (
            {"preference": CIDER, "cohort": 4, "privacy": PrivacyOptions(noise=1.0)},
            "--preference.rewards cider does not go with --privacy",
        ),
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
        ({"rewards": ("exact", "brevity")}, "--preference.rewards exact: there are exact-match, token-f1, brevity,"),
        ({"rewards": ("file", "brevity")}, "--preference.rewards file: say which with --preference.reward-file"),
        ({"reward_file": Path("a.csv")}, "--preference.reward-file a.csv: no reward reads it; name file among"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PreferenceOptions(**options)


@pytest.mark.broad
def test_an_audit_has_no_loss_to_compare(finished):
    with pytest.raises(UserError, match="draws answers anew in every step"):
        make_attacker(open_experiment(*finished))
