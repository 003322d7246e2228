"""Correlated noise: its matrix written out, its streaming product, what it gains, and jax-privacy where it is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.test_contract import make_context
from scipy.optimize import approx_fprime

from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.banded import _loss, find_deviations, make_banded_pool, optimize_bands
from fedvlm_jax.privacy.gaussian import draw


def write_out(coefficients, rounds):
    """C [T, T], with columns of norm 1."""
    matrix = np.zeros((rounds, rounds))
    for band, value in enumerate(coefficients):
        matrix += np.diag(np.full(rounds - band, value), -band)
    return matrix / np.linalg.norm(matrix, axis=0)


def error(matrix):
    """The mean over rounds of the squared noise in the sum of the updates so far."""
    return np.square(np.tril(np.ones_like(matrix)) @ np.linalg.inv(matrix)).sum() / len(matrix)


@pytest.mark.parametrize(("bands", "rounds"), [(2, 5), (3, 8), (4, 4)])
def test_rounds_get_the_noise_of_the_inverse_matrix(bands, rounds):
    """Row t of C⁻¹ Z times z C / m, Z being what each round draws; told is its norm."""
    noise, clip, expected, entries = 0.7, 0.3, 5.0, 6
    pool = make_banded_pool(noise, clip, expected, bands, rounds)
    messages = {"b": jnp.zeros((2, 2, 3))}
    state, got, fresh = pool.init({"b": jnp.zeros((2, 3))}), [], []
    for number in range(1, rounds + 1):
        ctx = make_context({}, None, number)
        pooled = pool.run(ctx, state=state, messages=messages, weights=jnp.ones(2))
        state = pooled.state
        got.append(np.ravel(pooled.message["b"]))
        fresh.append(np.asarray(draw(ctx.key, (entries,)), float))
        np.testing.assert_allclose(pooled.told["noise_norm"], np.linalg.norm(got[-1]), rtol=1e-5)
    matrix = write_out(optimize_bands(bands, rounds), rounds)
    wanted = np.linalg.inv(matrix) @ np.stack(fresh) * (noise * clip / expected)
    np.testing.assert_allclose(np.stack(got), wanted, rtol=2e-5, atol=1e-6)
    sums = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(matrix)
    each = np.linalg.norm(np.linalg.inv(matrix)) / np.sqrt(rounds)
    assert find_deviations(bands, rounds) == pytest.approx((each, np.linalg.norm(sums[-1])), rel=1e-9)


def test_columns_have_norm_one_and_those_of_one_client_share_no_row():
    """So k rounds of a client cost √k, as they do with noise that is new in every round."""
    bands, rounds = 4, 11
    matrix = write_out(optimize_bands(bands, rounds), rounds)
    for first in range(bands):
        mine = matrix[:, first::bands]
        np.testing.assert_allclose(mine.T @ mine, np.eye(mine.shape[1]), atol=1e-12)


def test_the_bands_are_the_best_there_are_and_better_than_none():
    bands, rounds = 3, 12
    found = optimize_bands(bands, rounds)
    rng = np.random.default_rng(0)
    least = _loss(found, rounds)[0]
    assert np.linalg.norm(found) == pytest.approx(1)
    for _ in range(200):
        assert _loss(found + 0.02 * rng.normal(size=bands), rounds)[0] >= least * (1 - 1e-9)
    assert error(write_out(found, rounds)) < 0.6 * error(np.eye(rounds))
    start = np.asarray([1.0, 0.4, 0.2])
    numeric = approx_fprime(start[1:], lambda rest: _loss(np.append(1.0, rest), rounds)[0])
    np.testing.assert_allclose(_loss(start, rounds)[1], numeric, rtol=1e-5)


def test_more_bands_leave_less_noise_in_the_sum():
    growth = [np.sqrt(64), *(find_deviations(bands, 64).sum for bands in (2, 4, 8, 16))]
    assert (np.diff(growth) < 0).all()


def test_a_leaf_that_is_not_sent_takes_its_noise_along():
    """A method may send other leaves in every round; those that it sends have the noise of the whole stream."""
    pool = make_banded_pool(1.0, 1.0, 1.0, 2, 4)
    shared = {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    both, one = pool.init(shared), pool.init(shared)
    for number, names in ((1, "a"), (2, "b"), (3, "a")):
        ctx, weights = make_context({}, None, number), jnp.ones(1)
        whole = pool.run(ctx, state=both, messages=jax.tree.map(lambda leaf: leaf[None], shared), weights=weights)
        part = pool.run(ctx, state=one, messages={names: shared[names][None]}, weights=weights)
        np.testing.assert_array_equal(part.message[names], whole.message[names])
        both, one = whole.state, part.state
    jax.tree.map(np.testing.assert_array_equal, both, one)


@pytest.mark.parametrize("bands", [1, 9])
def test_bands_that_cannot_be_are_refused(bands):
    with pytest.raises(UserError, match=f"--privacy.bands {bands}: .* 2 rounds or more, .* the run's 8 at most"):
        make_banded_pool(1.0, 1.0, 1.0, bands, 8)


@pytest.mark.parametrize(("bands", "rounds"), [(4, 32), (8, 100)])
def test_against_jax_privacy(bands, rounds):
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz")
    theirs = np.asarray(toeplitz.optimize_banded_toeplitz(rounds, bands), float)
    ours = optimize_bands(bands, rounds)
    np.testing.assert_allclose(ours, theirs / np.linalg.norm(theirs), atol=2e-3)
    assert error(write_out(ours, rounds)) < error(write_out(theirs, rounds)) * 1.001
    stream = toeplitz.inverse_as_streaming_matrix(jnp.asarray(ours, jnp.float32), column_normalize_for_n=rounds)
    np.testing.assert_allclose(stream.materialize(rounds), np.linalg.inv(write_out(ours, rounds)), atol=1e-4)
