"""Supervised fine-tuning: cross-entropy of the chosen answer's tokens, the mean over all tokens of the batch.

The prompt needs no mask: labels are the answer's tokens alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fedvlm_jax import lora
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.objectives.base import Metrics, Objective
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.objectives.log_probs import token_losses

SOURCE = "maximum likelihood of the chosen answer"


def make(options: PreferenceOptions) -> Objective:
    """sft; none of the preference options concerns it."""
    del options
    return Objective("sft", SOURCE, _loss)


def _loss(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
    losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
    total = jnp.maximum(counts.sum(), 1.0)
    loss = losses.sum() / total
    return loss, {"loss": loss, "token_accuracy": correct.sum() / total}
