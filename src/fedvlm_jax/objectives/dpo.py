"""Direct preference optimisation (arXiv 2305.18290, eq. 7), and two losses of its kind, on pairs of answers.

With the log-ratios of policy and reference, ρ_c = log π(chosen) − log π₀(chosen) and ρ_r likewise, h = ρ_c − ρ_r and β:

    sigmoid             −(1 − ε) log σ(β h) − ε log σ(−β h); ε > 0 is conservative DPO (ericmitchell.ai/cdpo.pdf)
    length-normalised   the same, each ρ divided by its answer's number of tokens (arXiv 2411.15124, Tülu 3)
    ipo                 (h − 1 / (2 β))² (arXiv 2310.12036, eq. 17), each ρ divided by its number of tokens too: the
                        paper leaves this open, its authors' results and TRL are so

The reference π₀ is the frozen base: no second model, and its log-probabilities come with the batch. The loss is the
mean over the pairs that count, those that have both answers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedvlm_jax import lora
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.objectives.base import Loss, Objective
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.objectives.log_probs import score_pairs

READS = ("beta", "variant", "label_smoothing")


def make(options: PreferenceOptions) -> Objective:
    """Make dpo, of one of the variants."""

    def loss(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> Loss:
        value, metrics = compare_answers(options, score_pairs(vlm, params, adapter, batch), batch)
        return value, {"loss": value, **metrics}

    source = "arXiv 2305.18290, eq. 7: −log σ(β h), h how much more than the base the adapter favours the chosen answer"
    return Objective("dpo", source, loss, pairs=True, reference=True, select_by="preference_accuracy", reads=READS)


def compare_answers(options: PreferenceOptions, scores: Mapping[str, Array], batch: Batch) -> Loss:
    """Compute the preference loss of what `score_pairs` found, and how the pairs fare.

    `batch` has `reference_chosen` and `reference_rejected` [B], log-probabilities summed over the tokens.

    Returns:
        The loss, and means over the pairs that count: `reward_accuracy`, the share whose chosen answer has the larger
        reward (a tie is no success: before training it is 0); `reward_margin`; `chosen_reward`, `rejected_reward`. A
        reward is β ρ, with ρ as the variant has it.
    """
    # 1 for a pair that has both answers. One that has not may hold any number, so its ratios are replaced, not scaled.
    counts = jnp.minimum(jnp.minimum(scores["chosen_tokens"], scores["rejected_tokens"]), 1.0)
    ratios = {
        name: jnp.where(counts > 0, scores[f"{name}_log_prob"] - batch[f"reference_{name}"], 0.0)
        for name in ("chosen", "rejected")
    }
    if options.variant != "sigmoid":
        ratios = {name: ratio / jnp.maximum(scores[f"{name}_tokens"], 1.0) for name, ratio in ratios.items()}
    margin = ratios["chosen"] - ratios["rejected"]
    if options.variant == "ipo":
        losses = jnp.square(margin - 1 / (2 * options.beta))
    else:
        smoothing, scaled = options.label_smoothing, options.beta * margin
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(scaled) - smoothing * jax.nn.log_sigmoid(-scaled)

    def average(values: Array) -> Float[Array, ""]:
        return jnp.sum(values * counts) / jnp.maximum(counts.sum(), 1.0)

    return average(losses), {
        "reward_accuracy": average(margin > 0),
        "reward_margin": options.beta * average(margin),
        "chosen_reward": options.beta * average(ratios["chosen"]),
        "rejected_reward": options.beta * average(ratios["rejected"]),
    }
