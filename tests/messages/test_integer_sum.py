"""The sum of integers against a plain mean and against NumPy's integers; what it tells; where it wraps around."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages.compression_cases import SECURE, make_compressed, wrap
from methods import test_contract as contract
from toy import make_method

from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import to_rows
from fedvlm_jax.messages.secure_sum import check_width, make_secure_sum

CLIENTS, ENTRIES = 5, 4000
NUMBERS = jnp.arange(CLIENTS)


def make_messages(size=0.01, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(CLIENTS, 40, 50)) * size, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(CLIENTS, 2000)) * size, jnp.float32),
    }


def pool(messages, weights, *, cohort=CLIENTS, key=0, numbers=NUMBERS, **options):
    run = make_secure_sum(MessageOptions(secure=True, **options), cohort).run
    ctx = contract.make_context({}, None)._replace(key=jax.random.key(key), numbers=numbers)
    return jax.jit(lambda m, w: run(ctx, state={}, messages=m, weights=w))(messages, jnp.asarray(weights, jnp.float32))


def as_row(pooled):
    return np.asarray(to_rows(jax.tree.map(lambda leaf: leaf[None], pooled.message))[0], np.float64)


WEIGHTS = {"uniform": [0.2] * 5, "weighted": [0.1, 0.3, 0.25, 0.05, 0.3], "one missing": [0.0, 0.25, 0.25, 0.25, 0.25]}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_it_is_the_weighted_mean_to_the_grid(weights):
    messages = make_messages()
    rows = np.asarray(to_rows(messages), np.float64)
    pooled = pool(messages, weights, secure_bits=16, secure_range=0.1)
    level = 0.1 / (2**15 - 1)
    off = as_row(pooled) - np.asarray(weights, np.float32).astype(np.float64) @ rows
    assert np.abs(off).max() < level * sum(w > 0 for w in weights) / CLIENTS * 1.01
    told = float(pooled.told["quantisation_error"])
    assert told == pytest.approx(np.linalg.norm(off) / np.linalg.norm(as_row(pooled)), rel=0.05)
    assert float(pooled.told["clipped_share"]) == 0
    assert bool(pooled.counted)


def test_more_bits_are_nearer():
    """Each bit halves the error, until float32's own is left."""
    messages, exact = make_messages(), None
    errors = []
    for bits in (8, 12, 16, 28):
        pooled = pool(messages, WEIGHTS["uniform"], secure_bits=bits, secure_range=0.1)
        exact = np.asarray(to_rows(messages), np.float64).mean(axis=0)
        errors.append(np.linalg.norm(as_row(pooled) - exact) / np.linalg.norm(exact))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.15)
    assert errors[3] < 1e-6


def test_the_mean_over_draws_is_the_mean():
    """At four bits, where a level is a seventh of the range; five standard errors for each entry."""
    draws, messages = 400, {"b": make_messages()["b"][:, :200]}
    run = make_secure_sum(MessageOptions(secure=True, secure_bits=4, secure_range=0.05), CLIENTS).run
    ctx = contract.make_context({}, None)._replace(numbers=NUMBERS)
    weights = jnp.asarray(WEIGHTS["weighted"], jnp.float32)

    def once(key):
        return run(ctx._replace(key=key), state={}, messages=messages, weights=weights).message["b"]

    found = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(1), draws)), np.float64)
    exact = np.asarray(weights, np.float64) @ np.clip(np.asarray(messages["b"], np.float64), -0.05, 0.05)
    error = found.std(axis=0) / np.sqrt(draws)
    assert (np.abs(found.mean(axis=0) - exact) < 5 * error + 1e-7).all()
    assert error.max() < 0.05 / 7 / 5, "the test could not tell a biased rounding"


def test_a_range_too_small_is_told_and_not_refused():
    messages = make_messages()
    rows = np.abs(np.asarray(to_rows(messages)))
    counted = [1, 2, 3, 4]
    pooled = pool(messages, WEIGHTS["one missing"], secure_range=0.01)
    assert float(pooled.told["clipped_share"]) == pytest.approx((rows[counted] > 0.01).mean(), abs=1e-6)
    assert np.abs(as_row(pooled)).max() <= 0.01 * 1.0001


def test_a_full_cohort_at_the_edge_of_the_range_does_not_wrap_around():
    for bits, cohort in ((24, 256), (30, 4), (31, 2), (29, 8)):
        messages = {"b": jnp.full((cohort, 3), 0.5).at[:, 1].set(-0.5).at[:, 2].set(0.25)}
        pooled = pool(messages, [1 / cohort] * cohort, cohort=cohort, numbers=jnp.arange(cohort), secure_bits=bits)
        np.testing.assert_allclose(pooled.message["b"], [0.5, -0.5, 0.25], rtol=1e-5)
        lone = pool(messages, [1.0] + [0.0] * (cohort - 1), cohort=cohort, numbers=jnp.arange(cohort), secure_bits=bits)
        np.testing.assert_allclose(lone.message["b"], [0.5, -0.5, 0.25], rtol=1e-5)


@pytest.mark.parametrize(("bits", "cohort"), [(24, 257), (31, 3), (25, 200), (2, 2**30 + 1)])
def test_wider_sums_are_refused(bits, cohort):
    with pytest.raises(UserError, match=rf"--messages.secure-bits {bits}: a sum of .* use \d+ bits at most"):
        check_width(MessageOptions(secure=True, secure_bits=bits), cohort)


def test_rounding_follows_the_client_and_not_its_place():
    messages, order = make_messages(), jnp.asarray([3, 0, 4, 1, 2])
    weights = np.asarray(WEIGHTS["weighted"])
    one = pool(messages, weights, secure_bits=8)
    other = pool(jax.tree.map(lambda x: x[order], messages), weights[np.asarray(order)], secure_bits=8, numbers=order)
    assert np.array_equal(as_row(one), as_row(other))
    assert not np.array_equal(as_row(one), as_row(pool(messages, weights, secure_bits=8, key=1)))


def test_padding_of_a_round_changes_nothing():
    """Places without a client, whatever they hold, come with more devices; the grid is the cohort's."""
    messages = make_messages()
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x[:2], jnp.nan)]), messages)
    one = pool(messages, WEIGHTS["weighted"])
    other = pool(padded, [*WEIGHTS["weighted"], 0, 0], numbers=jnp.asarray([0, 1, 2, 3, 4, 0, 0]))
    assert np.array_equal(as_row(one), as_row(other))
    assert one.told == other.told


@pytest.mark.broad
def test_many_bits_are_the_method_without_it():
    """The round of plora to the grid's tolerance: 30 bits of a range of 0.5 are 1e-9."""
    plain, summed = contract.make_case("plora"), make_compressed("plora", MessageOptions(secure=True, secure_bits=30))
    for path in ("shared", "start"):
        contract.assert_close(summed.rounds[0].out.server[path], plain.rounds[0].out.server[path], rtol=1e-5, atol=1e-7)


def test_methods_that_need_every_message_take_no_sum():
    with pytest.raises(ValueError, match="needs every client's message"):
        wrap(make_method("flora")[3], SECURE)


@pytest.mark.broad
def test_what_is_told_is_in_the_round_s_health():
    health = make_compressed("plora", SECURE).rounds[0].out.health
    assert {"quantisation_error", "clipped_share"} <= set(health)
    assert 0 < float(health["quantisation_error"]) < 1e-3
