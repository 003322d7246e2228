import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics import over_clients
from fedvlm_jax.evaluation.statistics.over_clients import (
    bootstrap_interval,
    gain_by_client,
    jain_index,
    summarise,
    summarise_matrix,
)

SCORES = st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), min_size=1, max_size=20)


def test_summary_by_hand():
    summary = summarise({"a": 0.1, "b": 0.5, "c": 0.6, "d": 0.8})
    assert summary.mean == pytest.approx(0.5)
    assert summary.std == pytest.approx(math.sqrt((0.16 + 0 + 0.01 + 0.09) / 4))
    assert (summary.worst_decile, summary.min, summary.max, summary.clients) == (0.1, 0.1, 0.8, 4)


@pytest.mark.parametrize(("count", "lowest"), [(1, [0]), (10, [0]), (11, [0, 1]), (16, [0, 1]), (21, [0, 1, 2])])
def test_the_worst_decile_is_the_lowest_tenth_rounded_up(count, lowest):
    values = {f"c{n}": float(count - 1 - n) for n in range(count)}
    assert summarise(values).worst_decile == np.mean(lowest)


@pytest.mark.parametrize(
    ("values", "message"),
    [({}, "no client"), ({"a": 1.0, "b": math.nan}, r"1 of 2 clients are not finite \(b\)")],
)
def test_summaries_of_nothing_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        summarise(values)


def test_jain_by_hand():
    # (1 + 2 + 3)^2 / (3 (1 + 4 + 9)) = 36 / 42
    assert jain_index(np.array([1.0, 2.0, 3.0])) == pytest.approx(6 / 7)
    assert summarise({"a": 1.0, "b": 2.0, "c": 3.0}).jain == pytest.approx(6 / 7)
    assert jain_index(np.array([0.0, 0.0, 5.0, 0.0])) == pytest.approx(1 / 4)
    assert jain_index(np.array([2.0, 0.0, 2.0, 0.0])) == pytest.approx(1 / 2)
    assert math.isnan(jain_index(np.zeros(3))), "nobody got anything: no fairness to speak of"
    assert jain_index(np.array([1e-200, 1e-200])) == 1.0, "squares below float64 must not matter"
    assert math.isnan(jain_index(np.array([1.0, -1.0])))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(1e-3, 1e3), st.randoms())
def test_jain_is_bounded_and_knows_no_unit_no_order_and_no_copies(values, unit, random):
    assume(any(values))
    fairness = jain_index(np.array(values))
    assert 1 / len(values) - 1e-12 <= fairness <= 1 + 1e-12
    assert jain_index(np.array(values + values)) == pytest.approx(fairness)
    # A value so small that it is lost with another unit would be another population.
    if min([value for value in values if value] or [1]) > 1e-100:
        shuffled = random.sample(values, len(values))
        assert jain_index(unit * np.array(shuffled)) == pytest.approx(fairness)


@given(SCORES, st.randoms())
def test_summaries_are_ordered_and_know_no_order_of_clients(values, random):
    summary = summarise(values)
    slack = 1e-9 * (1 + summary.max)
    assert summary.min <= summary.worst_decile + slack
    assert summary.worst_decile <= summary.mean + slack
    assert summary.mean <= summary.max + slack
    assert summary.std <= (summary.max - summary.min) / 2 + slack, "Popoviciu's bound"
    other = summarise(dict(random.sample(sorted(values.items()), len(values))))
    assert (other.mean, other.std, other.jain) == pytest.approx(
        (summary.mean, summary.std, summary.jain), abs=slack, nan_ok=True
    )


@given(SCORES)
def test_clients_with_copies_of_themselves_leave_mean_and_spread(values):
    both = values | {f"{client} again": value for client, value in values.items() if f"{client} again" not in values}
    one, two = summarise(values), summarise(both)
    assert (two.mean, two.std, two.jain) == pytest.approx(
        (one.mean, one.std, one.jain), rel=1e-6, abs=1e-6, nan_ok=True
    )


def test_one_client_is_a_summary():
    alone = summarise({"a": 0.5})
    assert (alone.mean, alone.std, alone.jain) == (0.5, 0.0, 1.0)


def test_gain_by_hand():
    values = {"a": 0.5, "b": 0.25, "c": 0.5, "held out": 0.9}
    base = {"a": 0.25, "b": 0.5, "c": 0.5, "other": 0.1}
    assert gain_by_client(values, base) == {"a": 0.25, "b": -0.25, "c": 0.0}
    gain = summarise(gain_by_client(values | {"d": 1.0}, base | {"d": 0.0}))
    assert (gain.mean, gain.min, gain.max, gain.clients) == (0.25, -0.25, 1.0, 4)


def name(values):
    return {f"c{n}": float(value) for n, value in enumerate(values)}


def test_the_interval_is_the_same_whatever_the_order():
    values = name(np.random.default_rng(0).random(9))
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(dict(reversed(values.items()))) == (low, high)
    assert low < np.mean(list(values.values())) < high


def test_it_is_the_ordinary_bootstrap(monkeypatch):
    monkeypatch.setattr(over_clients, "LEVEL", 0.9)
    monkeypatch.setattr(over_clients, "RESAMPLES", 40_000)
    values = np.random.default_rng(0).exponential(size=40)
    low, high = bootstrap_interval(name(values))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", confidence_level=0.9, n_resamples=40_000)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.02 * (high - low))
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.02 * (high - low))


@pytest.mark.parametrize(("level", "ends"), [(0.4, (0.5, 0.5)), (0.9, (0.0, 1.0))])
def test_the_interval_of_two_clients_by_hand(monkeypatch, level, ends):
    # Means of two draws out of {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    monkeypatch.setattr(over_clients, "LEVEL", level)
    assert bootstrap_interval({"a": 0.0, "b": 1.0}) == ends


def test_equal_clients_leave_no_doubt():
    assert bootstrap_interval(name([0.3] * 5)) == pytest.approx((0.3, 0.3))


def test_a_large_population_is_drawn_in_pieces(monkeypatch):
    values = name(np.random.default_rng(2).random(50))
    whole = bootstrap_interval(values)
    monkeypatch.setattr(over_clients, "DRAWS", 7 * 50)
    assert bootstrap_interval(values) == whole


@pytest.mark.parametrize(("values", "message"), [({}, "nothing to resample"), ({"a": math.inf}, "finite")])
def test_nothing_to_resample_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        bootstrap_interval(values)


def test_stored_intervals_keep_their_bits():
    """What earlier versions computed, to the last bit."""
    values = name([0.41, 0.53, 0.37, 0.68, 0.59, 0.44, 0.71])
    assert bootstrap_interval(values) == (0.44285714285714295, 0.6228571428571429)


# Down the models of a, b, c; across their data. On b's data a's model is better than b's own; on c's it ties.
VALUES = np.array([[0.5, 0.75, 0.25], [0.25, 0.5, 0.0], [0.25, 0.5, 0.25]])


def test_a_matrix_by_hand():
    found = summarise_matrix(VALUES, ["a", "b", "c"])
    assert found.diagonal == pytest.approx(1.25 / 3)
    assert found.off_diagonal == pytest.approx(2 / 6)
    assert found.beaten == ("b",)
    assert found.unbeaten == pytest.approx(2 / 3)


def test_of_a_loss_the_lowest_is_best():
    found = summarise_matrix(VALUES, ["a", "b", "c"], higher_is_better=False)
    assert found.unbeaten == pytest.approx(1 / 3)
    assert found.beaten == ("a", "c")


def test_one_client_has_no_others():
    found = summarise_matrix(np.array([[0.5]]), ["a"])
    assert (found.diagonal, found.unbeaten, found.beaten) == (0.5, 1.0, ())
    assert math.isnan(found.off_diagonal)


@given(st.data())
def test_the_order_of_clients_changes_nothing(data):
    count = data.draw(st.integers(1, 6))
    flat = data.draw(st.lists(st.integers(0, 5), min_size=count**2, max_size=count**2))
    values, names = np.reshape(flat, (count, count)), list("abcdef")[:count]
    order = data.draw(st.permutations(range(count)))
    one = summarise_matrix(values, names)
    other = summarise_matrix(values[np.ix_(order, order)], [names[n] for n in order])
    assert (other.diagonal, other.off_diagonal, other.unbeaten) == pytest.approx(
        (one.diagonal, one.off_diagonal, one.unbeaten), nan_ok=True
    )
    assert set(other.beaten) == set(one.beaten)
    assert one.unbeaten == pytest.approx(1 - len(one.beaten) / count)
    assert summarise_matrix(-values, names, higher_is_better=False).beaten == one.beaten


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (np.zeros((2, 3)), ["a", "b"], r"shape \(2, 3\) for 2 clients"),
        (np.zeros((0, 0)), [], "for 0 clients"),
        (np.array([[1.0, math.nan], [0.0, 0.0]]), ["a", "b"], "model of a has no finite value on the data of b"),
    ],
)
def test_what_is_no_matrix_is_refused(values, names, message):
    with pytest.raises(UserError, match=message):
        summarise_matrix(values, names)
