"""Supervised fine-tuning: cross-entropy of the chosen answer's tokens, the mean over all tokens of the batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.objectives.record import Metrics, Objective

__all__ = ["OBJECTIVE", "token_losses"]

IGNORED = -100


def token_losses(
    logits: Float[Array, "*batch labels vocabulary"], labels: Int[Array, "*batch labels"]
) -> tuple[Float[Array, "*batch labels"], Float[Array, "*batch labels"], Float[Array, "*batch labels"]]:
    """Per position: cross-entropy in nats, whether the likeliest token is right, and whether the position counts.

    The first two are 0 where the label is -100, as is the third, which is 1 elsewhere.
    """
    counts = (labels != IGNORED).astype(jnp.float32)
    targets = jnp.maximum(labels, 0)
    log_partition = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    # A one-hot product rather than a gather: its gradient is a product as well, not a scatter.
    chosen = jnp.sum(logits * jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype), axis=-1)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return (log_partition - chosen) * counts, correct * counts, counts


def _loss(vlm: Any, params: Any, adapter: Any, batch: Mapping[str, Array]) -> tuple[Float[Array, ""], Metrics]:
    losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
    total = jnp.maximum(counts.sum(), 1.0)
    loss = losses.sum() / total
    return loss, {"loss": loss, "token_accuracy": correct.sum() / total}


OBJECTIVE = Objective("sft", "maximum likelihood of the chosen answer", _loss)
