"""CLIP through the whole engine: classes of the data, base and novel ones apart, adapters in either tower."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import tiny_run

from fedvlm_jax import lora
from fedvlm_jax.analysis.explain import explain
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.zoo import pfedmoap
from fedvlm_jax.models.clip import processor as clip_processor
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import evaluate, federated_run, loaded_model
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.progress import SilentProgress

DATA = make_options(
    languages=("en",), vendors=("noto", "fluent"), tasks=("subgroup",), images_per_client=6, validation_per_client=3,
    test_per_client=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(clip):
    return clip


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(make_run(folder, None))


def make_run(folder, out, **changes):
    evaluation = EvaluationOptions(every=1, batch_size=12, examples=4)
    train = TrainOptions(rounds=1, local_steps=2, batch_size=4)
    return tiny_run(folder, out, data=DATA, cohort=None, train=train, evaluation=evaluation, **changes)


def test_too_many_classes_are_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(clip_processor, "MOST_CLASSES", 5)
    monkeypatch.setattr(loaded_model, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="different answers, and CLIP chooses among 5 at most"):
        load_model(make_run(folder, None))


def test_a_run_trains_among_base_classes_and_is_asked_about_all(folder, loaded):
    show = SilentProgress()
    experiment = open_experiment(make_run(folder, None), loaded, show)
    model, examples = experiment.model, experiment.examples
    learner, classes = model.learner.classes, model.vlm.classes
    trained = {examples.answers[row] for client in examples.clients for row in client.train}
    assert set(learner) == trained
    assert classes[: len(learner)] == learner
    assert set(examples.answers) | set(examples.rejected_answers) == set(classes)
    assert any(f"chosen among {len(classes)} classes" in note for note in show.notes)
    assert not any("generated" in note for note in show.notes)
    np.testing.assert_array_equal(examples.labels[:, 0], [classes.index(answer) for answer in examples.answers])
    # What does not depend on classes is computed once for all that the data may be cut into.
    other = open_experiment(make_run(folder, None, seed=2), loaded)
    assert other.model is not model
    assert other.store is experiment.store is not None
    assert open_experiment(make_run(folder, None), loaded).model is model
    worded = dataclasses.replace(make_run(folder, None), data=DATA.replace(class_prompt="{}, an emoji"))
    assert open_experiment(worded, loaded).model is not model


def test_base_and_novel_classes_are_scored_apart(folder, loaded):
    experiment = open_experiment(make_run(folder, None), loaded)
    evaluator, clients = experiment.evaluator, experiment.examples.clients
    scored = evaluator(experiment.model.params, {"zero_shot": None}, "test", range(len(clients)))["zero_shot"]
    trained = set(experiment.model.learner.classes)
    for client in clients:
        matches, counts = scored.values["exact_match"][client.name], {}
        answers = np.asarray([experiment.examples.answers[row] for row in client.test])
        base = np.asarray([answer in trained for answer in answers])
        for kind, chosen in (("base", base), ("novel", ~base)):
            counts[kind] = chosen.sum()
            found = scored.scores[f"exact_match_{kind}"].get(client.name)
            assert found == (matches[chosen].mean() if chosen.any() else None)
        assert counts["novel"] > 0
        own = np.isin(answers, [experiment.examples.answers[row] for row in client.train])
        assert scored.scores["exact_match_own"].get(client.name) == (matches[own].mean() if own.any() else None)
        both = [scored.scores[f"exact_match_{kind}"].get(client.name) for kind in ("base", "novel")]
        mean = None if None in both else 0 if 0 in both else 2 / sum(1 / value for value in both)
        assert scored.scores.get("exact_match_harmonic", {}).get(client.name) == (mean and pytest.approx(mean))
        texts = np.asarray(scored.texts[client.name])
        np.testing.assert_array_equal(matches, texts == answers)


@pytest.mark.broad
@pytest.mark.parametrize("towers", [pytest.param("text", marks=pytest.mark.slow), "both"])
def test_from_train_to_report(folder, tmp_path, towers):
    from fedvlm_jax.cli.main import main

    targets = "" if towers == "text" else r"(vision_tower|text_model)/layers/.*(q|v)_proj"
    run = make_run(folder, tmp_path / "run", lora=LoraOptions(rank=2, targets=targets))
    record = read_run(federated_run.train(run))
    results, resolved = record.results, record.config["resolved"]
    assert 0 < resolved["trained_classes"] < resolved["classes"]
    assert {"exact_match", "exact_match_base", "exact_match_novel"} <= results["personal"]["test"].keys()
    shared = load_file(tmp_path / "run" / "adapters" / "shared.safetensors")
    parts = {path.split("/")[0] for path in shared}
    assert parts == ({"text_model"} if towers == "text" else {"text_model", "vision_tower"})
    assert all(np.abs(array).max() > 0 for path, array in shared.items() if not path.endswith("scale"))
    assert np.isfinite(record.rounds[-1]["loss"])
    main(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "exact match, novel classes" in page
    for to in ("peft", "merged"):
        main(["export", str(tmp_path / "run"), "--to", to, "--clients", "noto-en"])
        manifest = json.loads((tmp_path / "run" / to / "manifest.json").read_text())
        entry = manifest["folders"]["clients/noto-en"]
        assert entry["logit_error"] <= 1e-5 < 0.1 < entry["largest_logit"]
        assert "AutoModel.from_pretrained" in (tmp_path / "run" / to / "clients" / "noto-en" / "README.md").read_text()


@pytest.mark.broad
@pytest.mark.parametrize("objective", ["dpo", pytest.param("sft+dpo", marks=pytest.mark.slow)])
def test_preferences_and_neighbours_choose_among_classes_too(folder, loaded, tmp_path, objective):
    run = make_run(folder, tmp_path / "run", objective=objective)
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, neighbours=2))
    record = read_run(federated_run.train(run, model=loaded))
    assert np.isfinite(record.rounds[-1]["loss"])
    assert set(record.results["neighbours"]["share"]) == set(record.config["resolved"]["clients"])


PROMPTED = {
    "promptfl": {"text_model"}, "fedpgp": {"text_model"}, "fedotp": {"text_model", "head"},
    "pfedmoap": {"text_model", "head"}, "pfedmma": {"text_model", "vision_tower"},
}  # fmt: skip
"""Method -> the parts of a client's adapter."""


@pytest.mark.broad
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "fedotp" else pytest.mark.slow) for name in PROMPTED]
)
def test_prompt_methods_from_train_to_a_second_evaluation(folder, loaded, tmp_path, method):
    """Stored adapters are asked again as they were: they say themselves how pictures are compared with classes."""
    numbers = {"pfedmoap": {"method_options": pfedmoap.Options(gate_heads=4)}}.get(method, {})
    form = LoraOptions(rank=2) if method == "pfedmma" else LoraOptions()
    run = make_run(folder, tmp_path / "run", method=method, objective="classify", lora=form, **numbers)
    validate(run)
    record = read_run(federated_run.train(run, model=loaded))
    assert np.isfinite(record.rounds[-1]["loss"])
    assert {"exact_match_own", "exact_match_harmonic"} <= record.results["personal"]["test"].keys()
    files = sorted((run.out / "adapters" / "clients").glob("*.safetensors"))
    assert {path.split("/")[0] for path in load_file(files[0])} == PROMPTED[method]
    (stage,) = explain(run).stages
    assert record.config["resolved"]["adapter_parameters"] == stage.trained
    again = evaluate.evaluate(run.out)
    for client, loss in record.results["personal"]["test"]["loss"].items():
        assert again["personal"]["test"]["loss"][client] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(UserError, match="neither merged into weights nor written as a folder of PEFT's"):
        read_adapter(run.out)


def read_adapter(out):
    """What an export reads first of a client's adapter."""
    return dict(lora.sites_of(tree.unflatten(load_file(next((out / "adapters" / "clients").glob("*.safetensors"))))))
