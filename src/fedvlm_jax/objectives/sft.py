"""Supervised fine-tuning: cross-entropy of the chosen answer's tokens, the mean over all tokens of the batch.

The prompt needs no mask: labels are the answer's tokens alone.
"""

import jax.numpy as jnp

from fedvlm_jax import lora
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.objectives.base import Loss, Objective
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.objectives.log_probs import token_losses


def make(options: PreferenceOptions) -> Objective:
    """Make sft; none of the preference options concerns it."""
    del options

    def loss(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> Loss:
        losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
        total = jnp.maximum(counts.sum(), 1.0)  # a batch in which nothing counts has loss 0
        value = losses.sum() / total
        return value, {"loss": value, "token_accuracy": correct.sum() / total}

    return Objective("sft", "maximum likelihood of the chosen answer", loss)
