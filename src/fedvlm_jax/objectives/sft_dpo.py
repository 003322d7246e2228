"""Both at once: the preference loss of `dpo` plus `sft_weight` times the cross-entropy of `sft`, from one pass.

The second term keeps the chosen answer likely, which a margin alone does not (as in arXiv 2404.19733, where it is
the mean per answer; here, as in `sft`, it is the mean over all tokens of the batch).
"""

import jax.numpy as jnp

from fedvlm_jax import lora
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.objectives import dpo
from fedvlm_jax.objectives.base import Loss, Objective
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.objectives.log_probs import score_pairs


def make(options: PreferenceOptions) -> Objective:
    """Make sft+dpo, of one of dpo's variants."""

    def loss(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> Loss:
        scores = score_pairs(vlm, params, adapter, batch)
        preference, metrics = dpo.compare_answers(options, scores, batch)
        tokens = jnp.maximum(scores["chosen_tokens"].sum(), 1.0)
        # As in `sft`: over all tokens of the batch, not per answer.
        likelihood = -scores["chosen_log_prob"].sum() / tokens
        value = preference + options.sft_weight * likelihood
        parts = {"dpo_loss": preference, "sft_loss": likelihood}
        return value, {"loss": value, **parts, "token_accuracy": scores["chosen_correct"].sum() / tokens, **metrics}

    reads = (*dpo.READS, "sft_weight")
    return Objective("sft+dpo", "dpo + sft_weight · sft", loss, pairs=True, reference=True, reads=reads)
