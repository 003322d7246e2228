"""The cross-entropy with its own gradient, against optax's and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedvlm_jax.objectives.log_probs import token_losses

SHAPE, VOCABULARY = (3, 4), 7


@pytest.fixture
def case():
    logits = 3 * jax.random.normal(jax.random.key(0), (*SHAPE, VOCABULARY))
    labels = jax.random.randint(jax.random.key(1), SHAPE, 0, VOCABULARY).at[1, 2:].set(-100)
    return logits, labels


def test_losses_accuracy_and_counts(case):
    logits, labels = case
    losses, correct, counts = jax.jit(token_losses)(logits, labels)
    want = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    counted = np.asarray(labels) != -100
    np.testing.assert_allclose(losses, np.where(counted, want, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, counted)
    np.testing.assert_array_equal(correct, (np.argmax(logits, -1) == labels) & counted)


def test_gradient(case):
    logits, labels = case
    weights = jax.random.normal(jax.random.key(2), SHAPE)

    def ours(logits):
        return jnp.sum(weights * token_losses(logits, labels)[0])

    def theirs(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(weights * jnp.where(labels == -100, 0, losses))

    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite(case):
    logits, labels = case
    losses, gradient = jax.value_and_grad(lambda x: token_losses(x, labels)[0].sum())(1e4 * logits)
    assert np.isfinite(losses)
    assert np.isfinite(gradient).all()
