import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.evaluation.metrics.preferences import (
    Pairs,
    measure_perplexity,
    prefer_chosen,
    reward_margin,
    score_preferences,
)

# Four pairs and a row without one. Summed: lost, won, level, won. By token: -1 > -2, -1 > -1.5, -1 = -1, -3 < -2.
PAIRS = Pairs(
    chosen=np.array([-8.0, -2.0, -3.0, -3.0, -5.0], np.float32),
    rejected=np.array([-4.0, -3.0, -3.0, -4.0, 0.0], np.float32),
    chosen_tokens=np.array([8, 2, 3, 1, 5]),
    rejected_tokens=np.array([2, 2, 3, 2, 0]),
    base_chosen=np.array([-9.0, -2.0, -5.0, -3.0, -6.0], np.float32),
    base_rejected=np.array([-3.0, -4.0, -3.0, -2.0, 0.0], np.float32),
)


def test_preferences_by_hand():
    found = score_preferences(PAIRS, beta=0.5)
    assert found == {
        "perplexity": pytest.approx(math.exp(21 / 19)),
        "preference_accuracy": 2.5 / 4,
        "preference_accuracy_per_token": 2.5 / 4,
        # Chosen moved by 1, 0, 2, 0; rejected by -1, 1, 0, -2: margins 2, -1, 2, 2 times beta.
        "reward_margin": 0.5 * 5 / 4,
    }
    np.testing.assert_allclose(reward_margin(PAIRS, 0.5)[:4], [1.0, -0.5, 1.0, 1.0])


def test_length_decides_between_the_two_accuracies():
    long = Pairs(np.array([-8.0]), np.array([-4.0]), np.array([8]), np.array([2]))
    found = score_preferences(long, beta=0.1)
    assert (found["preference_accuracy"], found["preference_accuracy_per_token"]) == (0.0, 1.0)
    assert "reward_margin" not in found


def test_a_tie_counts_half():
    assert prefer_chosen(np.array([1.0, 2.0, 2.0]), np.array([2.0, 1.0, 2.0])).tolist() == [0.0, 1.0, 0.5]


def test_what_cannot_be_said_is_left_out():
    none = np.zeros(2, int)
    alone = replace(PAIRS, rejected_tokens=np.zeros(5, int))
    assert list(score_preferences(alone, 0.1)) == ["perplexity"]
    assert score_preferences(Pairs(np.zeros(2), np.zeros(2), none, none), 0.1) == {}
    empty = np.zeros(0)
    assert score_preferences(Pairs(empty, empty, empty.astype(int), empty.astype(int)), 0.1) == {}
    with pytest.raises(ValueError, match="expected base_chosen"):
        reward_margin(replace(PAIRS, base_chosen=None), 0.1)
    with pytest.raises(ValueError, match="needs tokens"):
        measure_perplexity(np.zeros(2), none)


def test_perplexity_is_over_tokens_not_answers():
    # Uniform over four words is a perplexity of four, however long the answers are.
    tokens = np.array([1, 7, 3])
    assert measure_perplexity(-tokens * np.log(4), tokens) == pytest.approx(4.0)
    assert measure_perplexity(np.log([0.5, 0.125]), np.array([1, 1])) == pytest.approx(4.0)


SUM = st.floats(-100, 0, width=32)
ROW = st.tuples(SUM, SUM, SUM, SUM, st.integers(1, 9), st.integers(0, 9))


@given(st.lists(ROW, min_size=1, max_size=10), st.floats(0.01, 5))
def test_what_holds_for_any_pairs(rows, beta):
    chosen, rejected, base_chosen, base_rejected, tokens, rejected_tokens = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    pairs = Pairs(chosen, rejected, tokens, rejected_tokens, base_chosen, base_rejected)
    found = score_preferences(pairs, beta)
    assert found["perplexity"] >= 1
    if not rejected_tokens.any():
        return
    there = rejected_tokens > 0
    assert 0 <= found["preference_accuracy"] <= 1
    # With the two answers exchanged, what was won is lost, and margins change their sign.
    turned = Pairs(rejected, chosen, rejected_tokens, tokens, base_rejected, base_chosen)
    exchanged = score_preferences(turned, beta)
    assert exchanged["preference_accuracy"] == pytest.approx(1 - found["preference_accuracy"])
    assert exchanged["preference_accuracy_per_token"] == pytest.approx(1 - found["preference_accuracy_per_token"])
    assert exchanged["reward_margin"] == pytest.approx(-found["reward_margin"], abs=1e-9)
    # Under the base itself nothing has moved.
    base = score_preferences(replace(pairs, base_chosen=chosen, base_rejected=rejected), beta)
    assert base["reward_margin"] == 0
    # The rows without a pair change nothing but the perplexity.
    cut = Pairs(*(column[there] for column in (chosen, rejected, tokens, rejected_tokens, base_chosen, base_rejected)))
    assert score_preferences(cut, beta) | {"perplexity": 0} == pytest.approx(found | {"perplexity": 0})
