"""Pools over rows: NumPy written from the papers, other people's code, what hostile clients can do, and odd rounds."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.messages.config import WITHSTANDS, MessageOptions
from fedvlm_jax.messages.robust import make_pool
from fedvlm_jax.methods.base import Context

GOLDEN = Path(__file__).with_name("golden_pools.npz")
"""Written by `make_golden.py` beside it, with flwr 1.42.0 and byzfl 0.0.11."""

ROBUST = ("median", "trimmed", "krum", "multi-krum", "geometric")
CONTEXT = Context({}, jnp.int32(1), 0, {}, None, jax.random.key(0))


def options(pool, hostile=3, bound=1.0):
    return MessageOptions(pool=pool, hostile=hostile, bound=bound)


@functools.cache
def make_play(pool):
    """A pool as a compiled function of rows, which it gets as a message of two leaves."""
    rule = make_pool(pool)

    @jax.jit
    def play(rows, weights, numbers):
        cut = rows.shape[1] // 2
        messages = {"a": rows[:, :cut], "b": rows[:, cut:, None]}
        pooled = rule.run(CONTEXT._replace(numbers=numbers), state={}, messages=messages, weights=weights)
        return jnp.concatenate([pooled.message["a"], pooled.message["b"][:, 0]]), pooled.told

    return play


def run(name, rows, weights=None, numbers=None, **choices):
    """-> the pooled row, each client's selection, what else is told."""
    rows = np.asarray(rows, np.float32)
    weights = np.full(len(rows), 1 / len(rows), np.float32) if weights is None else np.asarray(weights, np.float32)
    numbers = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
    row, told = make_play(options(name, **choices))(rows, weights, numbers)
    told = {key: np.asarray(value) for key, value in told.items()}
    return np.asarray(row), told.pop("selection"), told


def draw(clients=16, entries=40, seed=0):
    return np.random.default_rng(seed).normal(size=(clients, entries)).astype(np.float32)


# --- The papers' arithmetic ---


def trim_by_hand(rows, cut):
    return np.stack([np.mean(sorted(column)[cut : len(column) - cut]) for column in rows.T.astype(float).tolist()])


def score_by_hand(rows, f):
    """Krum's score of each: the sum of squared distances to its n - f - 2 nearest others."""
    scores = []
    for one, row in enumerate(rows.astype(float)):
        others = sorted(float(((row - other) ** 2).sum()) for two, other in enumerate(rows.astype(float)) if two != one)
        scores.append(sum(others[: len(rows) - f - 2]))
    return np.asarray(scores)


def find_median_point(rows, weights):
    """Minimise the weighted sum of distances by gradient steps on it, smoothed, in float64."""
    rows, at = rows.astype(float), np.median(rows.astype(float), axis=0)
    for _ in range(20_000):
        lengths = np.sqrt(((rows - at) ** 2).sum(axis=1) + 1e-18)
        gradient = (weights / lengths) @ (at - rows)
        at = at - gradient / (weights / lengths).sum()
    return at


@pytest.mark.parametrize("clients", [4, 7, 16])
def test_median_and_trimmed_mean_are_those_of_every_entry(clients):
    rows = draw(clients)
    np.testing.assert_allclose(run("median", rows)[0], np.median(rows.astype(float), axis=0), rtol=1e-6, atol=1e-7)
    cut = (clients - 1) // 3
    got, selection, told = run("trimmed", rows, hostile=cut)
    np.testing.assert_allclose(got, trim_by_hand(rows, cut), rtol=2e-5, atol=1e-6)
    assert selection.mean() == pytest.approx((clients - 2 * cut) / clients, rel=1e-5)
    assert told[WITHSTANDS] == cut


@pytest.mark.parametrize(("clients", "hostile"), [(3, 0), (7, 2), (16, 6)])
def test_krum_takes_whose_neighbours_are_nearest(clients, hostile):
    rows, scores = draw(clients), score_by_hand(draw(clients), hostile)
    got, selection, told = run("krum", rows, hostile=hostile)
    np.testing.assert_array_equal(got, rows[scores.argmin()])  # a client's message, bit for bit
    assert selection.tolist() == np.eye(clients)[scores.argmin()].tolist()
    assert told[WITHSTANDS] == hostile
    best = np.argsort(scores)[: clients - hostile]
    got, selection, _ = run("multi-krum", rows, hostile=hostile)
    np.testing.assert_allclose(got, rows[best].astype(float).mean(axis=0), rtol=2e-5, atol=1e-6)
    assert set(np.flatnonzero(selection)) == set(best)


@pytest.mark.parametrize("clients", [3, 5, 16])
def test_the_geometric_median_has_the_smallest_sum_of_weighted_distances(clients):
    rows, weights = draw(clients, seed=clients), np.arange(2.0, clients + 2)  # no client has half of it
    rows[0] *= 20 if clients > 3 else 1  # of three points that two of them are near, it is one
    weights /= weights.sum()
    got, selection, _ = run("geometric", rows, weights)
    want = find_median_point(rows, weights)
    np.testing.assert_allclose(got, want, atol=2e-4)
    lengths = np.sqrt(((rows - want) ** 2).sum(axis=1))
    np.testing.assert_allclose(selection, lengths.min() / lengths, rtol=1e-3)


def test_where_the_geometric_median_is_a_client_s_message_it_is_met_closely():
    """Weights of 2, 3 and 4 ninths pull at right angles, the first two with the root of 13 ninths: the third holds."""
    rows = np.asarray([[1000.0, 0.0], [0.0, 10.0], [0.0, 0.0]])
    got, selection, _ = run("geometric", rows, np.asarray([2, 3, 4]) / 9)
    assert np.linalg.norm(got) < 2e-3 * 10  # NEAR is a share of a typical distance
    assert selection[2] == 1
    assert selection[:2].max() < 2e-3


def test_where_most_clients_agree_the_geometric_median_is_theirs():
    rows = draw()
    rows[:9] = rows[0]
    got, selection, _ = run("geometric", rows)
    np.testing.assert_allclose(got, rows[0], atol=1e-5)
    assert selection[:9].tolist() == [1.0] * 9
    assert selection[9:].max() < 1e-3


def test_a_bound_cuts_what_is_longer_and_nothing_else():
    rows, weights = np.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), np.asarray([0.5, 0.25, 0.25])
    got, selection, _ = run("bound", rows, weights, bound=1.0)
    np.testing.assert_allclose(got, 0.5 * np.asarray([0.6, 0.8]) + 0.25 * np.asarray([0.3, 0.4]), rtol=1e-6)
    np.testing.assert_allclose(selection, [0.2, 1.0, 1.0], rtol=1e-6)


def test_other_people_s_code_finds_the_same():
    """Flower's krum, multi-krum, median and trimmed mean, ByzFL's median, trimmed mean and geometric median."""
    stored = np.load(GOLDEN)
    rows = stored["rows"]
    hostile = int(stored["hostile"])
    names = {"median": "median", "trimmed": "trimmed", "krum": "krum", "multi-krum": "multikrum"}
    for ours, theirs in names.items():
        got = run(ours, rows, hostile=hostile)[0]
        np.testing.assert_allclose(got, stored[f"flwr_{theirs}"], rtol=1e-5, atol=1e-6, err_msg=ours)
    for name in ("median", "trimmed", "geometric"):
        got = run(name, rows, hostile=hostile)[0]
        tolerance = 1e-3 if name == "geometric" else 1e-6  # theirs stops when it moves little
        np.testing.assert_allclose(got, stored[f"byzfl_{name}"], rtol=1e-5, atol=tolerance, err_msg=name)


# --- Neutral settings ---


def test_without_hostile_clients_and_with_a_long_bound_the_rules_are_the_mean():
    rows, weights = draw(), np.linspace(0.5, 1.5, 16) / 16
    np.testing.assert_allclose(run("trimmed", rows, hostile=0)[0], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(run("multi-krum", rows, hostile=0)[0], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(run("bound", rows, weights, bound=1e30)[0], weights @ rows.astype(float), atol=1e-6)


# --- Hostile clients ---


def limit(name, clients, hostile, radius):
    """How far a rule's result may be from a point that all honest messages are within `radius` of."""
    if name in ("krum", "multi-krum"):
        # Who is taken has a score of at most the worst honest one's, (n - f - 2) (2 r)², and an honest neighbour.
        return radius + 2 * radius * np.sqrt(clients - hostile - 2)
    # Of the geometric median, for example lemma 2.1 of arXiv 1308.1334 with its constant for balls.
    return 2 * (clients - hostile) / (clients - 2 * hostile) * radius


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", ["scaled", "together", "enormous", "flipped", "alike"])
def test_hostile_clients_move_a_rule_no_further_than_derived(name, attack):
    clients, hostile = 16, 6
    rows = draw(clients, seed=3) + 0.5
    honest = rows[hostile:].copy()
    rows[:hostile] = {
        "scaled": 100 * rows[:hostile],
        "together": np.full_like(rows[:hostile], 100.0),
        "enormous": np.full_like(rows[:hostile], 1e17) * np.sign(draw(hostile, seed=5)),
        "flipped": -100 * rows[:hostile],
        "alike": np.repeat(-3 * honest.mean(axis=0)[None], hostile, axis=0),
    }[attack]
    got, _, _ = run(name, rows, hostile=hostile)
    if name in ("median", "trimmed"):
        slack = 1e-5
        assert (got >= honest.min(axis=0) - slack).all()
        assert (got <= honest.max(axis=0) + slack).all()
    centre = honest.mean(axis=0)
    radius = np.sqrt(((honest - centre) ** 2).sum(axis=1)).max()
    distance = float(np.sqrt(((got - centre) ** 2).sum()))
    assert distance < limit("geometric" if name in ("median", "trimmed") else name, clients, hostile, radius)
    mean = rows.mean(axis=0)
    assert attack == "alike" or np.sqrt(((mean - centre) ** 2).sum()) > limit("krum", clients, hostile, radius)


def test_a_bound_holds_whatever_is_sent():
    rows = draw() * np.logspace(-3, 18, 16)[:, None]
    got, _, _ = run("bound", rows, bound=2.5)
    assert np.linalg.norm(got) <= 2.5 * (1 + 1e-5)


# --- Who counts, order, ties, small rounds ---

EVERY = (*ROBUST, "bound")


@pytest.mark.parametrize(("name", "poison"), [*itertools.product(EVERY, [np.nan, np.inf, 1e30])])
def test_who_has_no_weight_never_counts(name, poison):
    rows, weights = draw(9), np.asarray([1, 2, 0, 3, 1, 0, 2, 1, 1]) / 11
    rows[[2, 5]] = poison
    left = weights > 0
    got, selection, told = run(name, rows, weights, hostile=2)
    alone, selected, _ = run(name, rows[left], weights[left], hostile=2)
    np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(selection[left], selected, rtol=1e-5)
    assert selection[~left].tolist() == [0, 0]
    assert told.get(WITHSTANDS, 2) == 2


@pytest.mark.parametrize("name", EVERY)
def test_where_nobody_counts_there_are_zeros(name):
    rows = draw(6)
    rows[2] = np.nan
    got, selection, told = run(name, rows, np.zeros(6), hostile=1)
    assert got.tolist() == [0.0] * 40
    assert selection.tolist() == [0.0] * 6
    assert told.get(WITHSTANDS, 0) == 0


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_clients_does_not_matter(name):
    rows, weights, order = draw(8), np.arange(1, 9) / 36, np.random.default_rng(1).permutation(8)
    rows[3] = rows[6]  # a tie, of which the lower number is taken
    one, selection, _ = run(name, rows, weights, hostile=2)
    other, permuted, _ = run(name, rows[order], weights[order], order, hostile=2)
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(permuted, selection[order], rtol=1e-5, atol=1e-6)


def test_of_equal_scores_krum_takes_the_lower_number():
    """Two pairs of equal messages, as far from each other as from the fifth."""
    rows = np.asarray([[0, 1], [0, 1], [1, 0], [1, 0], [1, 1]], np.float32)
    for numbers in ([0, 1, 2, 3, 4], [9, 8, 2, 1, 4]):
        got, selection, _ = run("krum", rows, numbers=numbers, hostile=1)
        first = min((0, 1, 2, 3), key=lambda k, numbers=numbers: numbers[k])
        assert np.flatnonzero(selection).tolist() == [first]
        np.testing.assert_array_equal(got, rows[first])


def test_of_equal_values_a_trimmed_mean_keeps_all_or_none():
    rows = np.asarray([[1.0] * 4, [1.0] * 4, [1.0] * 4, [2.0] * 4, [0.0] * 4])
    got, selection, _ = run("trimmed", rows, hostile=1)
    assert got.tolist() == [1.0] * 4
    assert selection.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("count", range(1, 8))
def test_a_round_with_fewer_clients_says_how_many_it_withstands(count):
    rows, weights = draw(8), (np.arange(8) < count) / count
    for name, most in (("trimmed", (count - 1) // 2), ("krum", max(0, (count - 3) // 2))):
        got, selection, told = run(name, rows, weights, hostile=3)
        assert told[WITHSTANDS] == min(3, most)
        assert np.isfinite(got).all()
        assert selection.max() > 0
    alone = run("krum", rows, weights, hostile=3)[0]
    want = score_by_hand(rows[:count], min(3, max(0, (count - 3) // 2))) if count > 2 else np.arange(count)
    np.testing.assert_array_equal(alone, rows[want.argmin()])


def test_a_message_of_few_entries_is_pooled_too():
    rows = draw(5, 3)
    np.testing.assert_allclose(run("median", rows)[0], np.median(rows, axis=0), rtol=1e-6)
    np.testing.assert_allclose(run("trimmed", draw(5, 2), hostile=2)[0], np.median(draw(5, 2), axis=0), rtol=1e-6)
