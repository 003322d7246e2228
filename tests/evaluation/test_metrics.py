import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics import exact_match, normalise, paired_difference, summarise


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Animals &  Nature. ", "animals & nature"),
        ("Straße", "strasse"),
        ("ＡＢＣ１２", "abc12"),
        ("「動物と自然」。", "動物と自然"),
        ("コーヒー", "コーヒー"),
        ("食べ物・飲み物", "食べ物・飲み物"),
        ("动物、自然！", "动物、自然"),
        ("«Еда и напитки»", "еда и напитки"),
        ("и\u0306", "й"),
        ("¿Qué es?", "qué es"),
        ("e\u0301", "é"),
        ("\ufeffface-smiling\u200b", "face-smiling"),
        ("\u3000顔\u00a0", "顔"),
        ("?", "?"),
        ("$5", "$5"),
        ("it's", "it's"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_normal_forms(text, form):
    assert normalise(text) == form


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_exact_match_by_hand():
    found = exact_match(["Food.", "food", "", "!"], ["food", "foods", "", "?"])
    assert found.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert exact_match([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 predictions for 2 answers"):
        exact_match(["a"], ["a", "b"])


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
