import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.evaluation.metrics.preferences import prefer_chosen, score_preferences


def numbers(chosen, rejected, chosen_tokens, rejected_tokens):
    return {
        "chosen_log_prob": np.asarray(chosen, np.float32),
        "rejected_log_prob": np.asarray(rejected, np.float32),
        "chosen_tokens": np.asarray(chosen_tokens),
        "rejected_tokens": np.asarray(rejected_tokens),
    }


# Four pairs and a row without one. Summed: lost, won, level, won. By token: -1 > -2, -1 > -1.5, -1 = -1, -3 < -2.
TOKENS = ([8, 2, 3, 1, 5], [2, 2, 3, 2, 0])
MODEL = numbers([-8.0, -2.0, -3.0, -3.0, -5.0], [-4.0, -3.0, -3.0, -4.0, 0.0], *TOKENS)
BASE = numbers([-9.0, -2.0, -5.0, -3.0, -6.0], [-3.0, -4.0, -3.0, -2.0, 0.0], *TOKENS)


def test_preferences_by_hand():
    assert score_preferences(MODEL, BASE, beta=0.5) == {
        "perplexity": pytest.approx(math.exp(21 / 19)),
        "preference_accuracy": 2.5 / 4,
        "preference_accuracy_per_token": 2.5 / 4,
        # Chosen moved by 1, 0, 2, 0; rejected by -1, 1, 0, -2: margins 2, -1, 2, 2 times beta.
        "reward_margin": 0.5 * 5 / 4,
    }


def test_margins_by_hand():
    for row, margin in enumerate([1.0, -0.5, 1.0, 1.0]):
        model, base = ({name: values[[row]] for name, values in side.items()} for side in (MODEL, BASE))
        assert score_preferences(model, base, 0.5)["reward_margin"] == margin


def test_length_decides_between_the_two_accuracies():
    found = score_preferences(numbers([-8.0], [-4.0], [8], [2]), None, beta=0.1)
    assert (found["preference_accuracy"], found["preference_accuracy_per_token"]) == (0.0, 1.0)
    assert "reward_margin" not in found


def test_a_tie_counts_half():
    assert prefer_chosen(np.array([1.0, 2.0, 2.0]), np.array([2.0, 1.0, 2.0])).tolist() == [0.0, 1.0, 0.5]


def test_what_cannot_be_said_is_left_out():
    assert list(score_preferences(MODEL | {"rejected_tokens": np.zeros(5, int)}, BASE, 0.1)) == ["perplexity"]
    alone = {name: values for name, values in MODEL.items() if name.startswith("chosen")}
    assert list(score_preferences(alone, None, 0.1)) == ["perplexity"]
    assert score_preferences(numbers([0, 0], [0, 0], [0, 0], [0, 0]), None, 0.1) == {}
    assert score_preferences(numbers([], [], [], []), None, 0.1) == {}


def test_perplexity_is_over_tokens_not_answers():
    # Uniform over four words is a perplexity of four, however long the answers are.
    tokens = np.array([1, 7, 3])
    for sums, counts in ((-tokens * np.log(4), tokens), (np.log([0.5, 0.125]), np.array([1, 1]))):
        found = score_preferences({"chosen_log_prob": sums, "chosen_tokens": counts}, None, 0.1)
        assert found == {"perplexity": pytest.approx(4.0)}


SUM = st.floats(-100, 0, width=32)
ROW = st.tuples(SUM, SUM, SUM, SUM, st.integers(1, 9), st.integers(0, 9))


@given(st.lists(ROW, min_size=1, max_size=10), st.floats(0.01, 5))
def test_what_holds_for_any_pairs(rows, beta):
    chosen, rejected, base_chosen, base_rejected, tokens, rejected_tokens = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    model = numbers(chosen, rejected, tokens, rejected_tokens)
    base = numbers(base_chosen, base_rejected, tokens, rejected_tokens)
    found = score_preferences(model, base, beta)
    assert found["perplexity"] >= 1
    if not rejected_tokens.any():
        return
    there = rejected_tokens > 0
    assert 0 <= found["preference_accuracy"] <= 1
    # With the two answers exchanged, what was won is lost, and margins change their sign.
    turned = numbers(rejected, chosen, rejected_tokens, tokens)
    exchanged = score_preferences(turned, numbers(base_rejected, base_chosen, rejected_tokens, tokens), beta)
    assert exchanged["preference_accuracy"] == pytest.approx(1 - found["preference_accuracy"])
    assert exchanged["preference_accuracy_per_token"] == pytest.approx(1 - found["preference_accuracy_per_token"])
    assert exchanged["reward_margin"] == pytest.approx(-found["reward_margin"], abs=1e-9)
    # Under the base itself nothing has moved.
    assert score_preferences(model, model, beta)["reward_margin"] == 0
    # The rows without a pair change nothing but the perplexity.
    cut = [{name: values[there] for name, values in side.items()} for side in (model, base)]
    assert score_preferences(*cut, beta) | {"perplexity": 0} == pytest.approx(found | {"perplexity": 0})
