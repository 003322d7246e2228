"""Canaries against mechanisms whose ε is known: never above it, and far above it where a mechanism is broken."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm

from fedvlm_jax.audit import canaries
from fedvlm_jax.messages.pool import Pool, Pooled, from_row, no_state, to_rows, with_pool

DELTA = 1e-5
SEEDS = range(10)


def gaussian_epsilon(noise, delta=DELTA):
    """The exact ε of the Gaussian mechanism of sensitivity 1 (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def excess(epsilon):
        above, below = 0.5 / noise - epsilon * noise, -0.5 / noise - epsilon * noise
        return norm.cdf(above) - math.exp(epsilon + norm.logcdf(below)) - delta

    return brentq(excess, 0, 500)


def test_without_delta_a_chance_is_a_tail_and_a_bound_is_that_of_clopper_and_pearson():
    assert canaries.find_p_value(1.0, 0.0, 70, 100, 100) == pytest.approx(binom.sf(69, 100, math.e / (1 + math.e)))
    share = binomtest(70, 100, alternative="greater").proportion_ci(0.95, "exact").low
    assert canaries.bound_epsilon(70, 100, 100, 0.0) == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_delta_makes_a_bound_smaller():
    bounds = [canaries.bound_epsilon(95, 100, 1000, delta) for delta in (0.0, 1e-5, 1e-3)]
    assert bounds[0] > bounds[1] > bounds[2] >= 0


@pytest.mark.parametrize("noise", [0.4, 1.0, 4.0])
def test_below_the_epsilon_of_a_gaussian_mechanism(noise):
    """512 canaries of orthogonal directions, each seen through noise alone."""
    bounds = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        included = rng.random(512) < 0.5
        bounds.append(canaries.judge_canaries(included + noise * rng.normal(size=512), included, DELTA).epsilon)
    assert max(bounds) <= gaussian_epsilon(noise)
    if noise == 0.4:  # ε is 12, and a coin's side is seen in nine of ten
        assert min(bounds) > 1


def make_pool(noise, *, clips=True):
    """A Gaussian mechanism of clipping norm 1, of four clients on average."""

    def run(ctx, state, messages, weights):
        rows = to_rows(messages)
        rows = rows * jnp.minimum(1, 1 / jnp.linalg.norm(rows, axis=1, keepdims=True)) if clips else rows
        total = (weights > 0) @ rows + noise * jax.random.normal(ctx.key, rows.shape[1:])
        return Pooled(from_row(total / 4, messages), state, {})

    return Pool("test", run, no_state, always=True)


def make_replay(pool, rounds, chance=1.0):
    *_, method, adapter = toy.make_method("plora", population=8)
    method = with_pool(method, pool)
    server = method.init(adapter=adapter)
    message = method.download(server=server)
    return canaries.Replay(method, server, message, rounds, chance, canaries.LOUD)


def test_below_the_epsilon_of_rounds_of_a_method_with_noise():
    """T rounds of noise z are one of z / √T; the toy's messages have 46 numbers, so canaries disturb each other."""
    replay, rounds, noise = make_replay(make_pool(2.0), 4), 4, 2.0
    bounds = [canaries.audit_mechanism(replay, 32, DELTA, [seed]).epsilon for seed in SEEDS]
    assert max(bounds) <= gaussian_epsilon(noise / rounds**0.5)


def test_a_mechanism_that_does_not_clip_is_found():
    """24 right guesses of 24 refute every ε up to 1.6, and with clipping it would be half of one."""
    noise, rounds = 16.0, 4
    bound = canaries.audit_mechanism(make_replay(make_pool(noise, clips=False), rounds), 24, DELTA, [0])
    assert bound.epsilon > 1.5 * gaussian_epsilon(noise / rounds**0.5)
    honest = canaries.audit_mechanism(make_replay(make_pool(noise), rounds), 24, DELTA, [0])
    assert honest.epsilon <= gaussian_epsilon(noise / rounds**0.5)


def test_who_is_not_drawn_is_not_seen():
    """Without a turn a canary's score is noise: no side of a coin is known."""
    replay = make_replay(make_pool(0.1), 2, chance=0.0)
    scores, included = replay.run(64, [3])
    assert 0 < included.sum() < 64
    assert canaries.judge_canaries(scores, included, DELTA).epsilon == 0


def test_the_same_seed_is_the_same_audit():
    replay = make_replay(make_pool(1.0), 2)
    np.testing.assert_array_equal(replay.run(16, [1])[0], replay.run(16, [1])[0])
    assert not np.array_equal(replay.run(16, [1])[0], replay.run(16, [2])[0])


@pytest.mark.parametrize("rounds", [1, 4])
def test_below_the_epsilon_of_the_gaussian_mechanism_of_runs(rounds):
    """The pool that a run has, at a clipping norm that is not 1."""
    gaussian = pytest.importorskip("fedvlm_jax.privacy.gaussian")
    noise = 1.0
    replay = make_replay(gaussian.make_gaussian_pool(noise, 0.5, 4), rounds)
    bounds = [canaries.audit_mechanism(replay, 32, DELTA, [seed]).epsilon for seed in SEEDS]
    assert max(bounds) <= gaussian_epsilon(noise / rounds**0.5)
