"""Runs share what does not depend on what they differ in."""

from dataclasses import replace
from types import SimpleNamespace

from tiny_run import tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, Run, SystemOptions, TrainOptions
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.training import final_evaluation
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.federated_data import BaseScoring, open_data
from fedvlm_jax.training.loaded_model import LoadedModel

VLM = SimpleNamespace(positions=64, most_prompt_tokens=lambda answer: 64, bind=None)


def test_runs_on_the_same_clients_and_lengths_share_their_data():
    loaded, run = LoadedModel(VLM, {}, None, None, SystemOptions(), {}), Run()
    data = open_data(loaded, run)
    assert data.fitted.max_answer_tokens <= VLM.positions
    for change in ({"method": "local"}, {"train": TrainOptions(rounds=3)}, {"evaluation": EvaluationOptions(every=1)}):
        assert open_data(loaded, replace(run, **change)) is data, change
    for change in ({"seed": 1}, {"objective": "dpo"}, {"data": run.data.replace(max_answer_tokens=5)}):
        assert open_data(loaded, replace(run, **change)) is not data, change


def test_the_bare_base_is_asked_once_for_all_runs_that_score_alike():
    data, asked = open_data(LoadedModel(VLM, {}, None, None, SystemOptions(), {}), Run()), []

    def ask():
        asked.append(1)
        return {}

    options = EvaluationOptions(), EvaluationOptions(), EvaluationOptions(batch_size=4)
    for evaluation in options:
        data.zero_shot(BaseScoring(evaluation, PreferenceOptions(), pixels=False), ask=ask)
    assert len(asked) == 2


def test_what_is_computed_of_pixels_and_of_kept_features_is_kept_apart(model, loaded, tmp_path, monkeypatch):
    """The vision tower rounds otherwise in a program with all that comes after it."""
    monkeypatch.setattr(final_evaluation, "score_base", lambda experiment: object())
    run = tiny_run(model, tmp_path, objective="dpo", system=SystemOptions(cache="memory"))
    features, pixels = (
        open_experiment(each, loaded) for each in (run, replace(run, system=SystemOptions(cache="off")))
    )
    assert features.data is pixels.data
    assert final_evaluation.ask_base(features) is final_evaluation.ask_base(features)
    assert final_evaluation.ask_base(features) is not final_evaluation.ask_base(pixels)
    assert features.evaluator.base is not pixels.evaluator.base
    assert features.find_reference() is not pixels.find_reference()
