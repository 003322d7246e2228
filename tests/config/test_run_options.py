"""Options: stored and brought back exactly, refused when they cannot work."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import (
    EvaluationOptions,
    LoraOptions,
    PreferenceOptions,
    Run,
    SystemOptions,
    TrainOptions,
    from_json,
    methods_available,
    objectives_available,
    to_json,
)
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError

UNUSUAL = Run(
    method="local",
    cohort=7,
    out=Path("runs/größer"),
    objective="sft+dpo",
    data=make_options(alpha=math.inf, languages=("ja", "zh")),
    preference=PreferenceOptions(beta=0.3, variant="length-normalised", label_smoothing=0.1, sft_weight=0.5),
    train=TrainOptions(learning_rate_a=0.1 + 0.2, decay=1.0, optimizer="sgd"),
    system=SystemOptions(wave=3, cache="disk", cache_dir=Path("cache")),
)


@pytest.mark.parametrize("run", [Run(), UNUSUAL])
def test_json_brings_back_the_same_run(run: Run) -> None:
    text = json.dumps(to_json(run), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == run
    assert type(again.out) is type(run.out)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda stored: stored.update(colour="red"), "unknown option colour"),
        (lambda stored: stored["train"].update(epochs=3), "unknown option train.epochs"),
        (lambda stored: stored["train"].pop("rounds"), "lacks train.rounds"),
        (lambda stored: stored["train"].update(rounds="16"), "train.rounds = '16'; expected int"),
        (lambda stored: stored["train"].update(rounds=True), "train.rounds = True; expected int"),
        (lambda stored: stored["train"].update(optimizer="lion"), "'adamw' or 'sgd'"),
        (lambda stored: stored.update(cohort=1.5), "cohort = 1.5"),
        (lambda stored: stored["data"].update(languages="en"), "data.languages = 'en'; expected a list"),
        (lambda stored: stored.update(lora=8), "lora should be a group of options"),
        (lambda stored: stored["system"].update(mesh_clients=2), "unknown option system.mesh_clients .* mesh, .*other"),
    ],
)
def test_a_stored_run_that_does_not_fit_is_refused_by_name(change: Any, expected: str) -> None:
    stored = to_json(Run())
    change(stored)
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        from_json(stored)


def test_methods_are_found_without_their_infrastructure() -> None:
    assert {"local", "fedavg-lora", "plora"} <= set(methods_available())
    assert not {"record", "share", "--init--"} & set(methods_available())


def test_objectives_are_found_without_their_infrastructure() -> None:
    assert objectives_available() == ("classify", "dpo", "reward", "sft", "sft+dpo")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run(method="fedavg"), "did you mean fedavg-lora"),
        (Run(objective="dpo!"), "--objective dpo!"),
        (Run(preference=PreferenceOptions(beta=0.2)), r"--preference.beta means nothing to --objective sft: .* dpo or"),
        (
            Run(objective="dpo", preference=PreferenceOptions(sft_weight=2.0)),
            r"--preference.sft-weight means nothing to --objective dpo: leave it out, or use --objective sft\+dpo",
        ),
        (Run(model="some/where/deep"), "no such folder"),
        (Run(cohort=0), "--cohort is 0"),
        (Run(train=TrainOptions(clip_norm=0)), "--train.clip-norm is 0"),
        (Run(train=TrainOptions(learning_rate_a=math.nan)), "--train.learning-rate-a is nan"),
        (Run(train=TrainOptions(learning_rate_a=0, learning_rate_b=0)), "nothing would be trained"),
        (Run(train=TrainOptions(decay=0)), "--train.decay is 0"),
        (Run(train=TrainOptions(decay_at=1.5)), "--train.decay-at is 1.5"),
        (Run(train=TrainOptions(warmup_rounds=-1)), "--train.warmup-rounds is -1"),
        (
            Run(train=TrainOptions(rounds=3, warmup_rounds=4)),
            "--train.warmup-rounds is 4, and there are --train.rounds 3",
        ),
        (Run(lora=LoraOptions(dropout=1.0)), "--lora.dropout is 1.0"),
        (Run(lora=LoraOptions(dropout=float("nan"))), "--lora.dropout is nan"),
        (Run(train=TrainOptions(optimizer="sgd", weight_decay=0.1)), "use --train.optimizer adamw"),
        (Run(lora=LoraOptions(targets="(fc1")), "not a regular expression"),
        (Run(cohort=4, system=SystemOptions(wave=8)), "wider than --cohort 4"),
        (Run(system=SystemOptions(wave=6, mesh="clients=4,model=2")), "use a multiple of 4"),
        (Run(system=SystemOptions(mesh="4")), "--mesh 4: expected clients=N or clients=N,model=M"),
        (Run(system=SystemOptions(mesh="clients=-1")), "--mesh clients=-1: expected"),
        (Run(system=SystemOptions(mesh="clients=2,model=0")), "every axis must be 1 or more"),
        (Run(system=SystemOptions(cache="memory", cache_dir=Path("x"))), "is for --system.cache disk"),
        (Run(system=SystemOptions(cache_gib=0.0)), "--system.cache-gib is 0.0"),
        (Run(evaluation=EvaluationOptions(select_by="loss")), "--evaluation.select-by loss"),
        (Run(evaluation=EvaluationOptions(metrics=("bleu",))), "--evaluation.metrics bleu"),
        (Run(evaluation=EvaluationOptions(metrics=("cider",))), "leaves out exact_match"),
        (Run(out=Path("a"), resume=Path("b")), "exclude each other"),
    ],
)
def test_what_cannot_work_is_refused(run: Run, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        validate(run)


def test_the_defaults_work() -> None:
    validate(Run())
    validate_comparison(Compare())
    validate(dataclasses.replace(UNUSUAL))


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (Compare(methods=()), "names no method"),
        (Compare(methods=("plora+tf",)), "plora"),
        (Compare(finetune_steps=0), "--finetune-steps is 0"),
        (Compare(base=Run(train=TrainOptions(finetune_steps=3))), r"\+ft"),
        (Compare(base=Run(resume=Path("x"))), "--out x"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused(comparison: Compare, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        validate_comparison(comparison)
