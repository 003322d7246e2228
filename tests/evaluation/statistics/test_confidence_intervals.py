import math

import numpy as np
import pytest
from scipy import stats

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.confidence_intervals import bootstrap_mean, paired_difference


def name(values):
    return {f"c{n}": float(value) for n, value in enumerate(values)}


def test_the_same_seed_gives_the_same_interval_whatever_the_order():
    runs = {seed: name(np.random.default_rng(seed).random(9)) for seed in range(4)}
    found = bootstrap_mean(runs, seed=5)
    backwards = {seed: dict(reversed(values.items())) for seed, values in reversed(runs.items())}
    assert bootstrap_mean(backwards, seed=5) == found
    assert bootstrap_mean(runs, seed=6) != found
    assert found.mean == pytest.approx(np.mean([list(values.values()) for values in runs.values()]))
    assert found.low < found.mean < found.high
    assert found.over == "seeds and clients"


def test_over_clients_it_is_the_ordinary_bootstrap():
    values = np.random.default_rng(0).exponential(size=40)
    ours = bootstrap_mean({7: name(values)}, level=0.9, resamples=40_000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", confidence_level=0.9, n_resamples=40_000)
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02 * width)
    assert ours.over == "clients"


def test_the_interval_of_two_clients_by_hand():
    # Means of two draws out of {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    found = bootstrap_mean({0: {"a": 0.0, "b": 1.0}}, level=0.4)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    found = bootstrap_mean({0: {"a": 0.0, "b": 1.0}}, level=0.9)
    assert (found.low, found.high) == (0.0, 1.0)


def test_nested_resamples_have_the_variance_of_theory():
    # Seeds of C clients: var = (variance between seed means + mean variance within a seed / C) / S, all divided by n.
    runs = {seed: name(seed + np.random.default_rng(seed).random(6)) for seed in range(8)}
    table = np.array([list(values.values()) for values in runs.values()])
    expected = np.sqrt((table.mean(1).var() + table.var(1).mean() / 6) / 8)
    found = bootstrap_mean(runs, level=0.6827, resamples=40_000)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.03)
    pooled = bootstrap_mean({0: name(table.ravel())}, level=0.6827, resamples=40_000)
    assert found.high - found.low > 2 * (pooled.high - pooled.low), "clients of a seed are not independent"


def test_seeds_may_have_other_clients_and_count_alike():
    found = bootstrap_mean({0: {"a": 0.0}, 1: {"b": 1.0, "c": 1.0, "d": 1.0}})
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_weights_are_those_of_the_mean():
    values = {"a": 0.0, "b": 1.0, "c": 0.5}
    assert bootstrap_mean({0: values}, {"a": 1, "b": 3, "c": 0}).mean == 0.75
    alone = bootstrap_mean({0: values}, {"a": 0, "b": 3, "c": 0})
    assert alone.mean == 1.0
    assert math.isnan(alone.low)
    level = bootstrap_mean({0: values}, {"a": 2, "b": 2, "c": 2})
    assert (level.low, level.high) == pytest.approx((bootstrap_mean({0: values}).low, bootstrap_mean({0: values}).high))


def test_equal_clients_leave_no_doubt():
    found = bootstrap_mean({0: name([0.3] * 5), 1: name([0.3] * 5)})
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))


def test_a_large_population_is_drawn_in_pieces(monkeypatch):
    from fedvlm_jax.evaluation.statistics import confidence_intervals

    values = {0: name(np.random.default_rng(2).random(50))}
    whole = bootstrap_mean(values)
    monkeypatch.setattr(confidence_intervals, "DRAWS", 7 * 50)
    assert bootstrap_mean(values) == whole


@pytest.mark.parametrize(
    ("runs", "message"),
    [({}, "nothing to resample"), ({0: {"a": 1.0}, 1: {}}, "nothing to resample"), ({0: {"a": math.inf}}, "finite")],
)
def test_nothing_to_resample_is_refused(runs, message):
    with pytest.raises(UserError, match=message):
        bootstrap_mean(runs)


def test_difference_over_seeds_by_hand():
    # Seed means of the differences are 0.1, 0.2, 0.3: mean 0.2, std 0.1, error 0.1/sqrt(3), t(0.975, 2) = 4.302653.
    a = {0: {"x": 0.5, "y": 0.7}, 1: {"x": 0.6, "y": 0.6}, 2: {"x": 1.0, "y": 0.6}}
    b = {0: {"x": 0.5, "y": 0.5}, 1: {"x": 0.3, "y": 0.5}, 2: {"x": 0.3, "y": 0.7}}
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.2)
    assert difference.standard_error == pytest.approx(0.0577350)
    assert difference.low == pytest.approx(0.2 - 0.2484138, abs=1e-6)
    assert difference.high == pytest.approx(0.2 + 0.2484138, abs=1e-6)
    assert difference.wins == pytest.approx(4.5 / 6)
    assert (difference.seeds, difference.clients, difference.over) == (3, 2, "seeds")


def test_difference_with_one_seed_is_over_clients():
    # Differences 0.1, 0.3: mean 0.2, std 0.141421, error 0.1, t(0.975, 1) = 12.706205.
    difference = paired_difference({7: {"x": 0.5, "y": 0.8}}, {7: {"x": 0.4, "y": 0.5}})
    assert difference.over == "clients"
    assert difference.standard_error == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.2 + 1.2706205)
    alone = paired_difference({7: {"x": 0.5}}, {7: {"x": 0.4}})
    assert alone.mean == pytest.approx(0.1)
    assert math.isnan(alone.standard_error)
    assert math.isnan(alone.low)


def test_differences_need_pairs():
    with pytest.raises(UserError, match="same seeds"):
        paired_difference({0: {"x": 1.0}}, {1: {"x": 1.0}})
    with pytest.raises(UserError, match=r"same clients.*seed 1"):
        paired_difference({0: {"x": 1.0}, 1: {"x": 1.0}}, {0: {"x": 1.0}, 1: {"y": 1.0}})
    with pytest.raises(UserError, match="same seeds"):
        paired_difference({}, {})
