"""The pools of differential privacy: clipping, sensitivity, noise, denominators; every linear method before them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_contract import CLIENTS, WEIGHTS, Case, assert_close, make_context, row
from toy import make_cohort, make_method, start_states, take

from fedvlm_jax.config.run_options import methods_available
from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.pool import to_rows, with_pool
from fedvlm_jax.privacy.banded import make_banded_pool
from fedvlm_jax.privacy.clipping import sum_clipped
from fedvlm_jax.privacy.gaussian import COUNT_NOISE, make_gaussian_pool, split_noise
from fedvlm_jax.utils import tree

ROUNDS = 6
POOLS = {
    "gaussian": functools.partial(make_gaussian_pool, 1.0, 0.1, 3.0),
    "adaptive": functools.partial(make_gaussian_pool, 0.2, 0.1, 3.0, 0.5),
    "banded": functools.partial(make_banded_pool, 1.0, 0.1, 3.0, 3, ROUNDS),
}
LINEAR = [name for name in methods_available() if make_method(name)[3].linear]
NUMBERS = st.one_of(
    st.floats(width=32),
    st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e20, 9e18, 1e-38, 1e-45, 0.0]),
    st.floats(-2, 2),
)


def run_pool(pool, messages, weights, *, state=None, number=1):
    state = pool.init(jax.tree.map(lambda leaf: leaf[0], messages)) if state is None else state
    ctx = make_context({}, None, number)
    return pool.run(ctx, state=state, messages=messages, weights=jnp.asarray(weights, jnp.float32))


def make_messages(clients=5, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return {
        "fc": {"b": jnp.asarray(size * rng.normal(size=(clients, 3, 4)), jnp.float32)},
        "out": jnp.ones((clients, 2)),
    }


def flat(message):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(message)]).astype(float)


# --- Clipping ---


@settings(max_examples=100, deadline=None)
@given(row=st.lists(NUMBERS, min_size=1, max_size=6), clip=st.floats(1e-3, 1e3))
def test_no_message_is_longer_than_the_clipping_norm(row, clip):
    message = {"b": jnp.asarray([row], jnp.float32)}
    total = np.asarray(sum_clipped(message, jnp.ones(1), clip).total, float)
    assert np.linalg.norm(total) <= clip * (1 + 1e-6)
    given_row = np.asarray(row, np.float32).astype(float)
    norm = np.linalg.norm(given_row)
    if not np.isfinite(norm):
        assert (total == 0).all()
    elif norm < 1.8e19:  # float32 does not hold the square of more, so it counts as what is not finite does
        np.testing.assert_allclose(total, given_row * min(1, clip / max(norm, 1e-30)), rtol=1e-5, atol=1e-37)


def test_the_norm_is_that_of_all_leaves_together():
    messages = {"a": jnp.asarray([[3.0]]), "b": {"c": jnp.asarray([[[4.0]]])}}
    summed = sum_clipped(messages, jnp.ones(1), 1.0)
    np.testing.assert_allclose(summed.total, [0.6, 0.8], rtol=1e-6)
    assert (float(summed.below), float(summed.sampled)) == (0.0, 1.0)
    assert float(sum_clipped(messages, jnp.ones(1), 5.0).below) == 1.0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=2, max_size=6),
    other=st.lists(NUMBERS, min_size=3, max_size=3), clip=st.floats(1e-2, 1e2), weight=st.floats(1e-3, 1),
)  # fmt: skip
def test_one_client_moves_the_sum_by_the_clipping_norm_replaced_by_twice(rows, other, clip, weight):
    def total(rows, weights):
        summed = sum_clipped({"b": jnp.asarray(rows, jnp.float32)}, jnp.asarray(weights, jnp.float32), clip)
        return np.asarray(summed.total, float)

    weights, rounding = [weight] * len(rows), clip * len(rows) * 1e-6
    whole = total(rows, weights)
    assert np.linalg.norm(whole - total([other, *rows[1:]], weights)) <= 2 * clip + rounding
    assert np.linalg.norm(whole - total(rows, [0, *weights[1:]])) <= clip + rounding


def test_weights_say_only_who_counts():
    messages = make_messages()
    uneven, even = ([0.7, 0.1, 0.2, 0, 0], [0.2, 0.2, 0.2, 0, 0])
    assert_close(*(sum_clipped(messages, jnp.asarray(weights), 1.0) for weights in (uneven, even)), rtol=0, atol=0)


# --- Noise ---


@pytest.mark.parametrize("clients", [2, 5])
def test_neutral_settings_are_the_mean(clients):
    """No noise, no bound, as many clients as on average: today's mean, within rounding."""
    messages, weights = make_messages(clients), np.full(clients, 1 / clients, np.float32)
    pooled = run_pool(make_gaussian_pool(0.0, np.inf, clients), messages, weights)
    assert_close(pooled.message, tree.weighted_sum(messages, jnp.asarray(weights)), rtol=1e-6, atol=1e-7)
    assert float(pooled.told["clip_fraction"]) == 0


def test_the_noise_has_the_deviation_that_it_says():
    """Of 1e5 draws: the deviation of a sample's is σ / √(2n), its mean's σ / √n, and 5 of them are never passed."""
    entries, noise, clip, expected = 100_000, 1.3, 0.4, 8.0
    pool = make_gaussian_pool(noise, clip, expected)
    pooled = run_pool(pool, {"b": jnp.zeros((2, entries))}, [0.5, 0.5])
    drawn, sigma = np.asarray(pooled.message["b"], float), noise * clip / expected
    assert abs(drawn.std() - sigma) < 5 * sigma / np.sqrt(2 * entries)
    assert abs(drawn.mean()) < 5 * sigma / np.sqrt(entries)
    np.testing.assert_allclose(pooled.told["noise_norm"], np.linalg.norm(drawn), rtol=1e-4)


@pytest.mark.parametrize("name", POOLS)
def test_another_round_has_another_noise_and_the_same_has_the_same(name):
    messages = jax.tree.map(jnp.zeros_like, make_messages())
    first, again, other = (
        flat(run_pool(POOLS[name](), messages, np.full(5, 0.2), number=number).message) for number in (1, 1, 2)
    )
    assert (first == again).all()
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.9
    assert (first != other).all()


@pytest.mark.parametrize("name", POOLS)
def test_who_drops_out_does_not_change_the_denominator(name):
    """What is left is the same sum over the same number, and the same noise."""
    messages, pool = make_messages(size=1e-3), POOLS[name]()
    messages["out"] *= 0
    few, many, none = (run_pool(pool, messages, weights) for weights in ([1, 0, 0, 0, 0], [0.2] * 5, [0] * 5))
    noise = flat(none.message)
    np.testing.assert_allclose(flat(few.message) - noise, flat(row(messages, 0)) / 3, atol=1e-7)
    np.testing.assert_allclose(flat(many.message) - noise, np.asarray(to_rows(messages)).sum(axis=0) / 3, atol=1e-7)
    assert [float(pooled.told["sampled"]) for pooled in (few, many, none)] == [1, 5, 0]


def test_told_numbers_by_hand():
    """Norms 5 and 0.5, C = 1: one of two is clipped, the sum is (0.6, 1.3)."""
    messages = {"b": jnp.asarray([[3.0, 4.0], [0.0, 0.5], [7.0, jnp.nan]])}
    pooled = run_pool(make_gaussian_pool(2.0, 1.0, 4.0), messages, [0.3, 0.3, 0.0])
    noise = np.asarray(pooled.message["b"], float) * 4 - [0.6, 1.3]
    told = {name: float(value) for name, value in pooled.told.items()}
    size = np.linalg.norm(noise)
    wanted = {"clip": 1.0, "clip_fraction": 0.5, "sampled": 2.0, "noise_norm": size / 4}
    assert told == pytest.approx(wanted | {"noise_to_update": size / np.hypot(0.6, 1.3)}, rel=1e-5)


# --- Adaptive clipping ---


def test_noise_is_split_as_the_paper_says():
    assert split_noise(1.0, 100) == pytest.approx((1.005038, 5.0), abs=1e-6)
    with pytest.raises(UserError, match="more than 10 clients on average, not 10"):
        split_noise(1.0, 10)


def test_the_clipping_norm_follows_the_quantile():
    """Geometrically, with a step that is exact where the count has no noise: worked out from the published rule."""
    norms, quantile, expected = np.linspace(0.1, 2.0, 200), 0.7, 200
    messages = {"b": jnp.asarray(norms[:, None], jnp.float32)}
    pool = make_gaussian_pool(0.0, 0.05, expected, quantile)
    weights, state, clip = np.full(200, 1 / 200, np.float32), None, 0.05
    for number in range(1, 101):
        pooled = run_pool(pool, messages, weights, state=state, number=number)
        noise = COUNT_NOISE * jax.random.normal(jax.random.fold_in(jax.random.key(number), 1))
        clip *= np.exp(-0.2 * (np.mean(norms <= clip) + float(noise) - quantile))
        state = pooled.state
        np.testing.assert_allclose(state["clip"], clip, rtol=1e-3)
    assert abs(clip - np.quantile(norms, quantile)) < 0.15


def test_the_update_is_clipped_to_the_norm_before_and_has_its_noise():
    entries = 100_000
    pool = make_gaussian_pool(1.0, 1.0, 100, 0.5)
    pooled = run_pool(pool, {"b": jnp.zeros((2, entries))}, [1, 1], state={"clip": jnp.float32(0.3)})
    sigma = 1.005038 * 0.3 / 100
    assert abs(np.std(np.asarray(pooled.message["b"], float)) - sigma) < 5 * sigma / np.sqrt(2 * entries)
    assert float(pooled.told["clip"]) == pytest.approx(0.3)


# --- Every linear method ---


@functools.cache
def trace_messages(name):
    """A linear method on the toy, its server, and random messages of its form; only shapes of it are computed."""
    _, params, trainer, method, adapter = make_method(name)
    server = method.init(adapter=adapter)
    states, cohort = start_states(method, server, CLIENTS), make_cohort(CLIENTS)

    def update(personal, client):
        ctx = make_context(params, functools.partial(trainer.run, params))
        ctx = ctx._replace(train=lambda *given, **more: trainer.run(params, *given, ctx.rates, **more))
        return method.client_update(ctx, server=server, personal=personal, client=client, key=jax.random.key(0))[1]

    shapes = jax.eval_shape(update, row(states, 0), row(cohort, 0))
    rng = np.random.default_rng(3)
    messages = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(CLIENTS, *leaf.shape)) / 9, leaf.dtype), shapes)
    return method, adapter, params, messages


@pytest.mark.parametrize("which", POOLS)
@pytest.mark.parametrize(
    "name",
    [name if name in ("plora", "rolora", "fed-sb") else pytest.param(name, marks=pytest.mark.broad) for name in LINEAR],
)
def test_every_linear_method_takes_noise(name, which):
    """Permuted clients, nobody's numbers where the weight is 0, and noise alone where nobody counts."""
    plain, adapter, params, messages = trace_messages(name)
    if not jax.tree.leaves(messages):
        pytest.skip(f"{name} sends nothing")
    method = with_pool(plain, POOLS[which]())
    ctx = make_context(params, None)._replace(numbers=jnp.arange(CLIENTS))
    traced = []

    @jax.jit
    def aggregate(server, messages, weights, number):
        traced.append(number)
        server, told = method.aggregate(
            ctx._replace(round=number, key=jax.random.fold_in(ctx.key, number)),
            server=server,
            messages=messages,
            weights=weights,
        )
        return server, told

    server, weights, first = method.init(adapter=adapter), jnp.asarray(WEIGHTS), jnp.int32(1)
    after, told = aggregate(server, messages, weights, first)
    order = np.asarray([2, 0, 3, 1])
    assert_close(aggregate(server, take(messages, order), weights[order], first)[0], after)
    poisoned = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), messages)
    zeroed = jax.tree.map(lambda leaf: leaf.at[3].set(0), messages)
    got, clean = (aggregate(server, sent, weights.at[3].set(0), first)[0] for sent in (poisoned, zeroed))
    assert_close(got, clean, rtol=0, atol=0)
    alone, said = aggregate(server, poisoned, jnp.zeros(CLIENTS), first)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(alone))
    assert float(said["noise_norm"]) == float(told["noise_norm"]) > 0
    assert float(said["sampled"]) == 0
    shared = (plain.download(server=state) for state in (alone, server))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, *shared))), "noise is released"
    second, _ = aggregate(after, messages, weights, jnp.int32(2))
    assert jax.tree.map(jnp.shape, second) == jax.tree.map(jnp.shape, server)
    assert len(traced) == 1, "one program for all rounds"


def test_a_method_that_needs_every_message_takes_none():
    with pytest.raises(ValueError, match="flora needs every client's message"):
        with_pool(make_method("flora")[3], make_gaussian_pool(1.0, 1.0, 4))


def test_the_compiled_round_keeps_its_contract_with_noise():
    """Waves change nothing, a client that is not finite is left out, and empty rounds release noise; one program."""
    case = Case("plora", lambda method: with_pool(method, POOLS["adaptive"]()))
    before = case.round._cache_size()
    at = case.rounds[2]
    assert {"clip", "clip_fraction", "noise_norm", "noise_to_update", "sampled"} <= at.out.health.keys()
    cohort = jax.tree.map(np.array, at.cohort)
    cohort.examples["image_features"][1] = np.nan
    left_out = case.again(at, cohort)[0]
    assert (float(left_out.health["sampled"]), float(at.out.health["sampled"])) == (3, 4)
    assert left_out.finite
    empty = case.again(at, weights=np.zeros(CLIENTS))[0]
    assert float(empty.health["sampled"]) == 0
    moved = np.abs(empty.server["shared"]["decoder"]["fc2"]["b"] - at.server["shared"]["decoder"]["fc2"]["b"])
    assert moved.min() > 0
    assert case.round._cache_size() == before
    waves = case.again(at, waves=2)[0]
    assert_close(waves.server, at.out.server, rtol=2e-4, atol=2e-5)


@pytest.mark.broad
def test_one_all_reduce_and_the_same_noise_on_four_devices():
    """A flag of each is gathered as always; the counts of clients and of norms ride on the sum."""
    script = Path(__file__).with_name("collectives_check.py")
    cases = ["plora:none", "plora:gaussian", "fedavg-lora:adaptive", "fed-sb:banded"]
    done = subprocess.run([sys.executable, str(script), *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == set(cases)
    for name, entry in found.items():
        assert {kind: count for kind, count in entry["collectives"].items() if count} == {
            "all-reduce": 1, "all-gather": 1,
        }, name  # fmt: skip
        assert entry["apart"] < 1e-5, name
