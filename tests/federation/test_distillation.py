"""Local training beside a teacher: the distance against NumPy, and where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import RATES, make_cohort, make_toy, take

from fedvlm_jax import lora
from fedvlm_jax.config.method_checks import check_method
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.distillation import soft_divergence
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.methods.base import Distillation
from fedvlm_jax.methods.config import find_method_options
from fedvlm_jax.objectives import load_objective


def divergence(teacher, student, temperature):
    """T² KL of every row, by its definition."""
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (teacher, student))
    return temperature**2 * np.sum(p * np.log(p / q), axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_distance_is_the_mean_over_tokens_that_count(temperature):
    teacher, student = np.random.default_rng(0).normal(size=(2, 4, 3, 7))
    labels = np.asarray([[1, 2, -100], [3, -100, -100], [0, 1, 2], [-100] * 3])
    found = soft_divergence(jnp.asarray(teacher), jnp.asarray(student), jnp.asarray(labels), temperature)
    rows = divergence(teacher, student, temperature)[labels >= 0]
    np.testing.assert_allclose(found, rows.mean(), rtol=1e-5)
    nothing = soft_divergence(jnp.asarray(teacher), jnp.asarray(student), jnp.full((4, 3), -100), temperature)
    assert float(nothing) == 0


def train(objective="sft", **choices):
    vlm, params = make_toy()
    trainer = make_local_trainer(vlm, load_objective(objective), optimizer="sgd", clip_norm=None)
    adapters = [lora.init(jax.random.key(k), vlm.sites, lora.LoRA(rank=2)) for k in (1, 2)]
    moved = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), adapters[1]
    )
    client = jax.tree.map(jnp.asarray, take(make_cohort(1), 0))
    if objective != "sft":
        client.examples["rejected_labels"] = client.examples["labels"][:, ::-1]
        client.examples.update(dict.fromkeys(("reference_chosen", "reference_rejected"), jnp.full(10, -4.0)))
    if "weight" in choices:
        choices = {"distil": Distillation(moved, **choices)}
    factors, _, metrics = trainer.run(params, adapters[0], trainer.start(adapters[0]), client, RATES, **choices)
    return factors, metrics


def test_without_weight_a_teacher_changes_nothing_and_with_all_of_it_the_data_do_not_count():
    plain, _ = train()
    for weight, same in ((0.0, True), (0.5, False)):
        taught, metrics = train(weight=weight)
        close = [np.allclose(x, y, atol=1e-6) for x, y in zip(*map(jax.tree.leaves, (plain, taught)), strict=True)]
        assert all(close) == same
        assert metrics["distillation"] > 0


def test_a_pupil_comes_nearer_to_its_teacher():
    apart = [float(train(weight=weight, temperature=2.0)[1]["distillation"]) for weight in (0.0, 1.0)]
    assert apart[1] < apart[0]


def test_answers_of_pairs_are_compared_too():
    assert train("sft+dpo", weight=0.5)[1]["distillation"] > 0


def test_answers_that_are_drawn_have_no_teacher():
    with pytest.raises(UserError, match="--objective reward does not go with --method feddat, because its adapters"):
        check_method(Run(method="feddat", method_options=find_method_options("feddat")(), objective="reward"),
                     "--method feddat")  # fmt: skip
