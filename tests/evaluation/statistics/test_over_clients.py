import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.over_clients import gain_by_client, jain_index, summarise, summarise_gain

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


def test_weights_move_mean_and_std_alone():
    summary = summarise({"a": 0.0, "b": 1.0}, {"a": 3, "b": 1, "unused": 9})
    assert summary.mean == 0.25
    assert summary.std == pytest.approx(math.sqrt(0.75 * 0.0625 + 0.25 * 0.5625))
    assert summary.worst_decile == 0.0


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ({}, None, "no client"),
        ({"a": 1.0, "b": math.nan}, None, r"1 of 2 clients are not finite \(b\)"),
        ({"a": 1.0}, {}, "no weight for a"),
        ({"a": 1.0}, {"a": 0.0}, "at least one of them above zero"),
        ({"a": 1.0}, {"a": -1.0}, "non-negative"),
    ],
)
def test_summaries_of_nothing_are_refused(values, weights, message):
    with pytest.raises(UserError, match=message):
        summarise(values, weights)


def test_a_loss_is_worst_where_it_is_highest():
    values = {f"c{n}": float(n) for n in range(11)}
    assert summarise(values).worst_decile == 0.5
    assert summarise(values, higher_is_better=False).worst_decile == 9.5


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
    if len(values) > 1:
        assert summary.min - slack <= summary.low <= summary.mean + slack
        assert summary.mean - slack <= summary.high <= summary.max + slack
    other = summarise(dict(random.sample(sorted(values.items()), len(values))))
    assert (other.low, other.high) == pytest.approx((summary.low, summary.high), nan_ok=True)
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


def test_a_summary_carries_its_interval():
    values = {f"c{n}": float(value) for n, value in enumerate(np.random.default_rng(3).random(30))}
    summary = summarise(values)
    theirs = stats.bootstrap((list(values.values()),), np.mean, method="percentile", n_resamples=20_000)
    reach = summary.high - summary.low
    assert summary.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * reach)
    assert summary.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * reach)
    alone = summarise({"a": 0.5})
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert (alone.mean, alone.std, alone.jain) == (0.5, 0.0, 1.0)


def test_gain_by_hand():
    values = {"a": 0.5, "b": 0.25, "c": 0.5, "held out": 0.9}
    base = {"a": 0.25, "b": 0.5, "c": 0.5, "other": 0.1}
    assert gain_by_client(values, base) == {"a": 0.25, "b": -0.25, "c": 0.0}
    gain = summarise_gain(values | {"d": 1.0}, base | {"d": 0.0})
    assert (gain.mean, gain.min, gain.max, gain.clients) == (0.25, -0.25, 1.0, 4)
    assert (gain.better, gain.worse) == (0.5, 0.25)
    assert gain.low < 0.25 < gain.high


def test_a_lower_loss_is_a_gain():
    assert gain_by_client({"a": 1.0}, {"a": 3.0}, higher_is_better=False) == {"a": 2.0}
    gain = summarise_gain({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0}, higher_is_better=False)
    assert (gain.mean, gain.better, gain.worse) == (0.5, 0.5, 0.5)


def test_gains_need_a_client_in_both():
    with pytest.raises(UserError, match="there is none"):
        summarise_gain({"a": 1.0}, {"b": 1.0})
