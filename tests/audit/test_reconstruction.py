"""Inputs in the span of an update, where linear algebra says how much of them is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import toy

from fedvlm_jax import lora
from fedvlm_jax.audit import reconstruction
from fedvlm_jax.models import load_vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils import tree

LAYER = ("encoder/fc1", 0)


def share_of(basis, inputs):
    """The share of a span that inputs explain."""
    return reconstruction.share_in(reconstruction.find_span(np.asarray(inputs, float).T), basis.T)


def take_step(rows, seed=0):
    """One step of SGD on so many rows, B not zero: the adapter before, the update, the rows' inputs."""
    _, params, trainer, _, adapter = toy.make_method("fedsa-lora", optimizer="sgd")
    flat = tree.flatten(adapter)
    drawn = {
        path: jax.random.normal(jax.random.key(number + seed), leaf.shape)
        for number, (path, leaf) in enumerate(flat.items())
        if path.endswith("/b")
    }
    adapter = tree.unflatten(flat | drawn)
    cohort = toy.make_cohort(1, rows=rows, steps=1, batch=rows, seed=seed)
    client = jax.tree.map(lambda leaf: leaf[0], cohort)._replace(
        indices=np.arange(rows, dtype=np.int32)[None], mask=np.ones((1, rows), bool)
    )
    after, *_ = jax.jit(trainer.run)(params, adapter, trainer.start(adapter), client, toy.RATES)
    factors = [tree.partition(part, lambda path: path[-1] in "ab")[0] for part in (after, adapter)]
    update = jax.tree.map(lambda new, old: np.asarray(new - old), *factors)
    return adapter, update, client.examples["image_features"]


def of_factor(update, name):
    return tree.partition(update, lambda path: path.endswith(f"/{name}"))[0]


def test_shares_by_hand():
    basis = reconstruction.find_span(np.asarray([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))
    assert basis.shape == (3, 1)
    assert reconstruction.share_in(basis, np.asarray([[3.0, 4.0, 0.0], [0.0, 5.0, 0.0]])) == pytest.approx(9 / 50)
    assert share_of(basis, np.asarray([[3.0, 4.0, 0.0], [0.0, 5.0, 0.0]])) == pytest.approx(1)
    assert reconstruction.find_span(np.zeros((3, 2))).shape == (3, 0)


def test_the_update_of_a_after_a_step_spans_the_inputs():
    """∇A = s Σ xᵀ (δ Bᵀ): of as many rows as ranks, all of the inputs, and not of other rows."""
    adapter, update, inputs = take_step(rows=2)
    basis = reconstruction.find_spans(of_factor(update, "a"), adapter)[LAYER]
    assert basis.shape == (toy.WIDTH, 2)
    assert reconstruction.share_in(basis, inputs) == pytest.approx(1, abs=1e-9)
    assert reconstruction.share_in(basis, take_step(rows=2, seed=7)[2]) < 0.9


def test_of_more_rows_than_ranks_the_span_lies_in_the_inputs():
    adapter, update, inputs = take_step(rows=4)
    basis = reconstruction.find_spans(of_factor(update, "a"), adapter)[LAYER]
    assert share_of(basis, inputs) == pytest.approx(1, abs=1e-9)
    assert share_of(basis, take_step(rows=4, seed=7)[2]) < 0.999
    assert reconstruction.share_in(basis, inputs) < 0.999


def test_the_update_of_b_shows_an_input_through_a_alone():
    """Of one row ∆B = (x A)ᵀ δ: the direction A Aᵀ x, and the share of x in it worked out of A."""
    adapter, update, (x,) = take_step(rows=1)
    (basis,) = [reconstruction.find_spans(of_factor(update, "b"), adapter)[LAYER]]
    a = np.asarray(adapter["encoder"]["fc1"]["a"], np.float64)
    seen = a @ a.T @ x
    assert basis.shape == (toy.WIDTH, 1)
    wanted = (seen @ x) ** 2 / (seen @ seen) / (x @ x)
    assert reconstruction.share_in(basis, x[None]) == pytest.approx(wanted, rel=1e-4)


def test_of_as_many_rows_as_ranks_the_update_of_b_shows_the_columns_of_a_and_no_row():
    spans = []
    for seed in (0, 7):
        adapter, update, _ = take_step(rows=3, seed=seed)
        # One A for both: the seed draws B and the rows.
        spans.append(reconstruction.find_spans(of_factor(update, "b"), adapter)[LAYER])
    one, other = (basis @ basis.T for basis in spans)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_measures_of_spans_by_hand():
    spans = {("fc", 0): np.asarray([[1.0], [0.0]]), ("none", 0): np.zeros((2, 0))}
    batch, unrelated = ({("fc", 0): np.asarray([[row]])} for row in ([1.0, 0.0], [3.0, 4.0]))
    assert reconstruction.measure_spans(spans, batch, unrelated) == (1.0, pytest.approx(0.36), 0.5, 1.0)
    both = reconstruction.find_bases({("fc", 0): np.concatenate([unrelated[("fc", 0)], batch[("fc", 0)]])})
    assert reconstruction.rank_rows(spans, both).tolist() == pytest.approx([0.36, 1.0])
    assert reconstruction.measure_spans({("none", 0): np.zeros((2, 0))}, batch, unrelated) is None


@pytest.mark.broad
def test_captured_inputs_explain_the_gradient_of_a(tmp_path):
    """In a real model, scanned layers and padding included: a row's gradient of A lies in what was captured of it."""
    vlm, params = load_vlm(tiny_run.make_folder(tmp_path / "model"))
    adapter = lora.init(jax.random.key(0), vlm.sites, lora.LoRA(rank=2, targets=vlm.targets))
    flat = tree.flatten(adapter)
    adapter = tree.unflatten(
        {
            path: leaf + 0.1 * (path[-1] == "b") * jax.random.normal(jax.random.key(1), leaf.shape)
            for path, leaf in flat.items()
        }
    )
    rng = np.random.default_rng(0)
    batch = {
        "image_features": rng.normal(size=(2, 17, vlm.image_width)).astype(np.float32),
        "input_ids": np.concatenate([np.full((2, 17), vlm.image_token_id), rng.integers(10, 90, (2, 7))], 1).astype(
            np.int32
        ),
        "attention_mask": np.asarray([[1] * 24, [1] * 20 + [0] * 4], np.int32),
        "labels": np.asarray([[7, 8, 9, 2], [7, 2, -100, -100]], np.int32),
    }
    inputs = reconstruction.capture_inputs(vlm, params, adapter, batch)
    assert {path for path, _ in inputs} == {path.rpartition("/")[0] for path in flat}
    loss, bases = load_objective("sft").loss, reconstruction.find_bases(inputs)
    for row, tokens in enumerate((24, 20)):
        one = {name: values[[row]] for name, values in batch.items()}
        gradient = jax.grad(lambda adapter, one=one: loss(vlm, params, adapter, one)[0])(adapter)
        of_a = tree.partition(gradient, lambda path: path.endswith("/a"))[0]
        for layer, span in reconstruction.find_spans(of_a, adapter).items():
            assert share_of(span, inputs[layer][row]) == pytest.approx(1, abs=1e-3), layer
        real = inputs["language_model/encoder/layers/fc1", 0][row].any(axis=-1)
        assert real.tolist() == [True] * tokens + [False] * (24 - tokens)
        other = reconstruction.rank_rows(reconstruction.find_spans(of_a, adapter), bases)
        assert other.argmax() == row
    assert jnp.isfinite(other).all()
