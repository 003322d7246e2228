"""Metrics of preference pairs, from a model's log-probabilities of the chosen and the rejected answer.

The implicit reward of an answer is beta · (log p(answer) - log p_base(answer)), as DPO (arXiv 2305.18290) defines it.
Rows whose rejected answer is empty or equal to the chosen one have no rejected token, and count in no metric of pairs.
Axes: N examples.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Sums = Float[np.ndarray, " examples"]
Counts = Int[np.ndarray, " examples"]


@dataclass(frozen=True)
class Pairs:
    """Summed log-probabilities (nats) of answers, and how many tokens each sum is over.

    Attributes:
        chosen, rejected: under the model.
        chosen_tokens, rejected_tokens: of the answers; 0 rejected tokens where an example has no pair.
        base_chosen, base_rejected: under the frozen base; None without rewards.
    """

    chosen: Sums
    rejected: Sums
    chosen_tokens: Counts
    rejected_tokens: Counts
    base_chosen: Sums | None = None
    base_rejected: Sums | None = None


def prefer_chosen(chosen: Sums, rejected: Sums) -> Sums:
    """Score 1.0 where the chosen answer has the higher value, 0.0 where the rejected one has, 0.5 where they are level.

    A tie counts half, so that a model that cannot decide gets what guessing gets.

    >>> prefer_chosen(np.asarray([-1.0, -3.0, -2.0]), np.asarray([-2.0, -2.0, -2.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def reward_margin(pairs: Pairs, beta: float) -> Sums:
    """Compute beta · ((chosen - base_chosen) - (rejected - base_rejected)): the shift towards the chosen answer.

    Raises:
        ValueError: the pairs came without the base's log-probabilities.
    """
    if pairs.base_chosen is None or pairs.base_rejected is None:
        raise ValueError("a reward margin needs the base's log-probabilities; expected base_chosen and base_rejected")
    # In float64: the difference of two sums of hundreds of nats is a small number.
    gain_chosen = np.asarray(pairs.chosen, np.float64) - pairs.base_chosen
    return beta * (gain_chosen - (np.asarray(pairs.rejected, np.float64) - pairs.base_rejected))


def measure_perplexity(sums: Sums, tokens: Counts) -> float:
    """Compute exp(-sum of log-probabilities / tokens), over all tokens, so that long answers weigh more.

    Raises:
        ValueError: there is no token.

    >>> round(measure_perplexity(np.log([0.25, 0.25]), np.asarray([1, 1])), 6)
    4.0
    """
    if not np.sum(tokens):
        raise ValueError("a perplexity needs tokens; expected examples with answers")
    return float(np.exp(-np.sum(sums, dtype=np.float64) / np.sum(tokens)))


def score_preferences(pairs: Pairs, beta: float) -> dict[str, float]:
    """Compute the preference metrics of a set of examples, a client's say.

    Returns:
        `perplexity` of the chosen answers, where there is a token; and, where there is a pair, the means over pairs of
        `preference_accuracy` (summed log-probabilities, which favour the shorter answer),
        `preference_accuracy_per_token` (length-normalised: divided by the tokens), and, if the base's are there,
        `reward_margin`. A metric without examples is left out.
    """
    scores = {}
    if np.sum(pairs.chosen_tokens):
        scores["perplexity"] = measure_perplexity(pairs.chosen, pairs.chosen_tokens)
    paired = (np.asarray(pairs.chosen_tokens) > 0) & (np.asarray(pairs.rejected_tokens) > 0)
    if not paired.any():
        return scores
    chosen, rejected = (np.asarray(sums, np.float64)[paired] for sums in (pairs.chosen, pairs.rejected))
    scores["preference_accuracy"] = float(prefer_chosen(chosen, rejected).mean())
    each = chosen / pairs.chosen_tokens[paired], rejected / pairs.rejected_tokens[paired]
    scores["preference_accuracy_per_token"] = float(prefer_chosen(*each).mean())
    if pairs.base_chosen is not None:
        scores["reward_margin"] = float(reward_margin(pairs, beta)[paired].mean())
    return scores
