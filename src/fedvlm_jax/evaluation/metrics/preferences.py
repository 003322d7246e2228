"""Metrics of preference pairs, from a model's log-probabilities of the chosen and the rejected answer.

The implicit reward of an answer is beta · (log p(answer) - log p_base(answer)), as DPO (arXiv 2305.18290) defines it.
Rows whose rejected answer is empty or equal to the chosen one have no rejected token, and count in no metric of pairs.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

Numbers = Mapping[str, Float[np.ndarray, " examples"]]
"""Sums over the tokens of each example's answers, in nats, and how many tokens they are, named as by `score_pairs`.

Without rejected answers there are none of theirs.
"""


def prefer_chosen(chosen: np.ndarray, rejected: np.ndarray) -> Float[np.ndarray, " examples"]:
    """Score 1.0 where the chosen answer has the higher value, 0.0 where the rejected one has, 0.5 where they are level.

    A tie counts half, so that a model that cannot decide gets what guessing gets.

    >>> prefer_chosen(np.asarray([-1.0, -3.0, -2.0]), np.asarray([-2.0, -2.0, -2.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def score_preferences(model: Numbers, base: Numbers | None, beta: float) -> dict[str, float]:
    """Compute the preference metrics of a set of examples, a client's say, with rewards where the base's are known.

    Returns:
        `perplexity` of the chosen answers over all tokens, so that long answers weigh more, where there is a token;
        and, where there is a pair, the means over pairs of `preference_accuracy` (summed log-probabilities, which
        favour the shorter answer), `preference_accuracy_per_token` (length-normalised: divided by the tokens), and
        `reward_margin`: beta · ((chosen - base's) - (rejected - base's)), the shift towards the chosen answer.

    >>> model = {"chosen_log_prob": np.log([0.25, 0.25]), "chosen_tokens": np.asarray([1, 1])}
    >>> round(score_preferences(model, None, beta=0.1)["perplexity"], 6)
    4.0
    """
    scores: dict[str, float] = {}
    tokens = model["chosen_tokens"]
    if np.sum(tokens):
        scores["perplexity"] = float(np.exp(-np.sum(model["chosen_log_prob"], dtype=np.float64) / np.sum(tokens)))
    paired = (tokens > 0) & (model.get("rejected_tokens", np.zeros_like(tokens)) > 0)
    if not paired.any():
        return scores
    # In float64: a margin is a small difference of sums of hundreds of nats.
    chosen, rejected = (model[f"{name}_log_prob"][paired].astype(np.float64) for name in ("chosen", "rejected"))
    per_token = chosen / tokens[paired], rejected / model["rejected_tokens"][paired]
    scores["preference_accuracy"] = float(prefer_chosen(chosen, rejected).mean())
    scores["preference_accuracy_per_token"] = float(prefer_chosen(*per_token).mean())
    if base is not None and "rejected_log_prob" in base:
        gains = chosen - base["chosen_log_prob"][paired], rejected - base["rejected_log_prob"][paired]
        scores["reward_margin"] = float((beta * (gains[0] - gains[1])).mean())
    return scores
