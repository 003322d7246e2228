import math

import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.over_seeds import paired_difference


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
