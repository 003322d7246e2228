"""DPO and its kin on a model of two words, every number worked out on paper, and what must hold in general.

The model answers every place with the logits z = s·a·b, A = a = 2, B = b = (ln 3, 0), s = ½, on a base of zeros: with
z = (ln 3, 0) word 0 has probability ¾ and word 1 has ¼, while the base gives each ½.

Pair 1: chosen (0, 0), rejected (1).
    ρ_c = 2 ln(¾ / ½) = 2 ln(3/2) = ln(9/4), ρ_r = ln(¼ / ½) = −ln 2, h = ln(9/2).
    ∂ log p(0) / ∂z = (1 − ¾, −¼) = (¼, −¼) for each of two words, ∂ log p(1) / ∂z = (−¾, ¾): ∂h/∂z = (5/4, −5/4).
    Means per token: ρ_c = ln(3/2), ρ_r = −ln 2, h = ln 3, ∂h/∂z = (¼ + ¾, −1) = (1, −1).
Pair 2: chosen (1), rejected (0).
    ρ_c = −ln 2, ρ_r = ln(3/2), h = −ln 3.

Then ∂L/∂a = s·∂L/∂z · b = ½ ln 3 · ∂L/∂z₀, and ∂L/∂b = s·a·∂L/∂z = ∂L/∂z.
"""

from math import log
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.objectives import PreferenceOptions, load_objective
from fedvlm_jax.objectives.log_probs import score_pairs

NO = -100
PAIR_1 = ([0, 0], [1, NO])
PAIR_2 = ([1, NO], [0, NO])
HALF = log(1 / 2)


def answer(params, adapter, batch):
    z = params["z"] + (0 if adapter is None else adapter["scale"] * adapter["a"] @ adapter["b"])
    return jnp.broadcast_to(z, (*batch["labels"].shape, 2))


VLM = SimpleNamespace(logits=answer)
PARAMS = {"z": jnp.zeros(2)}
ADAPTER = {"a": jnp.asarray([2.0]), "b": jnp.asarray([[log(3), 0.0]]), "scale": jnp.asarray(0.5)}
FRESH = ADAPTER | {"b": jnp.zeros((1, 2))}


def make_batch(*pairs):
    labels, rejected = (np.asarray(side, np.int32) for side in zip(*pairs, strict=True))
    return {
        "labels": labels,
        "rejected_labels": rejected,
        "reference_chosen": (labels != NO).sum(1) * np.float32(HALF),
        "reference_rejected": (rejected != NO).sum(1) * np.float32(HALF),
    }


def run(batch, adapter=ADAPTER, name="dpo", **options):
    """-> the loss, the gradients of a and b, the metrics."""
    objective = load_objective(name, PreferenceOptions(**options))

    def loss(factors):
        return objective.loss(VLM, PARAMS, adapter | factors, batch)

    factors = {name: adapter[name] for name in "ab"}
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(factors)
    assert metrics["loss"] == value
    return float(value), gradient, metrics


@pytest.mark.parametrize(
    ("options", "loss", "slope"),  # slope: ∂L/∂z₀ = −∂L/∂z₁
    [
        # σ(h) = (9/2) / (11/2) = 9/11; ∂L/∂h = −2/11, times 5/4
        ({"beta": 1.0}, log(11 / 9), -5 / 22),
        # σ(h/2): e^(h/2) = √4.5 = 3/√2; −σ(−h/2)/2 · 5/4, σ(−h/2) = √2 / (√2 + 3)
        ({"beta": 0.5}, log(1 + 2**0.5 / 3), -5 / 8 * 2**0.5 / (2**0.5 + 3)),
        # ∂L/∂h = −¾·2/11 + ¼·9/11 = 3/44: the margin is larger than one flipped pair in four allows
        ({"beta": 1.0, "label_smoothing": 0.25}, 3 / 4 * log(11 / 9) + 1 / 4 * log(11 / 2), 15 / 176),
        # β h = 2 ln 3 = ln 9, σ = 9/10; ∂L/∂h = −2/10, times 1
        ({"beta": 2.0, "variant": "length-normalised"}, log(10 / 9), -1 / 5),
        # (h − ½)², ∂L/∂h = 2 (h − ½), times 1
        ({"beta": 1.0, "variant": "ipo"}, (log(3) - 1 / 2) ** 2, 2 * (log(3) - 1 / 2)),
    ],
)
def test_one_pair(options, loss, slope):
    value, gradient, metrics = run(make_batch(PAIR_1), **options)
    assert value == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(gradient["b"], [[slope, -slope]], rtol=1e-5)
    np.testing.assert_allclose(gradient["a"], [log(3) / 2 * slope], rtol=1e-5)
    assert metrics["reward_accuracy"] == 1


def test_rewards_of_two_pairs_and_one_that_does_not_count():
    """Losses ln(11/9) and ln(1 + 3) = ln 4; h is ln(9/2) and −ln 3, so chosen is ahead in one of two."""
    without = ([0, 1], [NO, NO])
    batch = make_batch(PAIR_1, PAIR_2, without)
    batch["reference_chosen"][2] = 55.0
    value, _, metrics = run(batch, beta=1.0)
    assert value == pytest.approx((log(11 / 9) + log(4)) / 2, rel=1e-5)
    expected = {
        "reward_accuracy": 1 / 2,
        "reward_margin": (log(9 / 2) - log(3)) / 2,
        "chosen_reward": (log(9 / 4) - log(2)) / 2,
        "rejected_reward": (-log(2) + log(3 / 2)) / 2,
    }
    assert {name: pytest.approx(float(metrics[name]), rel=1e-5) for name in expected} == expected
    halved = run(batch, beta=0.5)[2]
    for name in ("reward_margin", "chosen_reward", "rejected_reward"):
        assert halved[name] == pytest.approx(expected[name] / 2, rel=1e-5), "a reward is β times a log-ratio"


def test_scores():
    scores = score_pairs(VLM, PARAMS, ADAPTER, make_batch(PAIR_1, PAIR_2))
    expected = {
        "chosen_log_prob": [2 * log(3 / 4), log(1 / 4)],
        "rejected_log_prob": [log(1 / 4), log(3 / 4)],
        "chosen_tokens": [2, 1],
        "rejected_tokens": [1, 1],
        "chosen_correct": [2, 0],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-6, err_msg=name)


def test_sft_and_dpo_at_once():
    """Chosen words 0, 0 and 1: their mean cross-entropy is (2 ln(4/3) + ln 4) / 3; two of three are the likeliest."""
    batch = make_batch(PAIR_1, PAIR_2)
    value, gradient, metrics = run(batch, name="sft+dpo", beta=1.0, sft_weight=3.0)
    likelihood = (2 * log(4 / 3) + log(4)) / 3
    assert metrics["sft_loss"] == pytest.approx(likelihood, rel=1e-5)
    assert metrics["dpo_loss"] == pytest.approx((log(11 / 9) + log(4)) / 2, rel=1e-5)
    assert value == pytest.approx(float(metrics["dpo_loss"]) + 3 * likelihood, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(2 / 3)
    alone, preference = run(batch, name="sft"), run(batch, beta=1.0)
    assert alone[0] == pytest.approx(likelihood, rel=1e-5)
    assert alone[2]["token_accuracy"] == metrics["token_accuracy"]
    for factor in "ab":
        both = preference[1][factor] + 3 * alone[1][factor]
        np.testing.assert_allclose(gradient[factor], both, rtol=1e-5)


# --- What must hold whatever the numbers ---


@pytest.mark.parametrize("variant", ["sigmoid", "length-normalised"])
def test_where_the_adapter_is_the_base_the_loss_is_log_2_and_nobody_is_ahead(variant):
    value, gradient, metrics = run(make_batch(PAIR_1), FRESH, variant=variant)
    assert value == pytest.approx(log(2), rel=1e-6)
    assert metrics["reward_margin"] == 0
    assert metrics["reward_accuracy"] == 0, "a tie is no success"
    assert np.abs(gradient["b"]).max() > 0
    assert np.abs(gradient["a"]).max() == 0, "B is zero"


def test_smoothing_by_a_half_pulls_margins_to_zero():
    """One pair in two the wrong way round: nothing is to be learnt, and zero is the best margin."""
    _, gradient, _ = run(make_batch(PAIR_1), FRESH, label_smoothing=0.5)
    assert np.abs(gradient["b"]).max() == 0
    _, gradient, _ = run(make_batch(PAIR_1), label_smoothing=0.5)
    assert gradient["b"][0, 0] > 0, "h grows with z₀ and is above zero, so z₀ is to shrink"


def test_ipo_is_content_at_its_margin():
    """h = ln 3 on means per token, so with 1 / (2 β) = ln 3 nothing is left to do."""
    value, gradient, _ = run(make_batch(PAIR_1), variant="ipo", beta=1 / (2 * log(3)))
    assert value == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(gradient["b"], 0, atol=1e-6)
    assert run(make_batch(PAIR_1), FRESH, variant="ipo", beta=0.25)[0] == pytest.approx(4)


@pytest.mark.parametrize("variant", ["sigmoid", "length-normalised", "ipo"])
def test_swapping_the_answers_negates_the_margin(variant):
    one = run(make_batch(PAIR_1, PAIR_2), variant=variant)[2]
    two = run(make_batch(PAIR_1[::-1], PAIR_2[::-1]), variant=variant)[2]
    assert two["reward_margin"] == pytest.approx(-float(one["reward_margin"]), rel=1e-6)
    assert two["chosen_reward"] == pytest.approx(float(one["rejected_reward"]), rel=1e-6)
    assert one["reward_accuracy"] + two["reward_accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0.0}, "--preference.beta is 0.0: it must be above 0"),
        ({"beta": float("nan")}, "--preference.beta is nan"),
        ({"label_smoothing": 0.6}, "--preference.label-smoothing is 0.6: it must be from 0 to 0.5"),
        ({"label_smoothing": 0.1, "variant": "ipo"}, "--preference.label-smoothing is 0.1: it must be 0 with"),
        ({"sft_weight": -1.0}, "--preference.sft-weight is -1.0"),
    ],
)
def test_options_that_mean_nothing(options, expected):
    with pytest.raises(UserError, match=expected):
        PreferenceOptions(**options)
