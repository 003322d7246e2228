"""Supervised fine-tuning: cross-entropy of the chosen answer's tokens, the mean over all tokens of the batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.data.encode import IGNORED
from fedvlm_jax.objectives.record import Metrics, Objective

__all__ = ["OBJECTIVE", "token_losses"]


def token_losses(
    logits: Float[Array, "*batch labels vocabulary"], labels: Int[Array, "*batch labels"]
) -> tuple[Float[Array, "*batch labels"], Float[Array, "*batch labels"], Float[Array, "*batch labels"]]:
    """Per position: cross-entropy in nats, whether the likeliest token is right, and whether the position counts.

    The first two are 0 where the label is -100, as is the third, which is 1 elsewhere.
    """
    counts = (labels != IGNORED).astype(jnp.float32)
    losses, correct = _cross_entropy(logits.astype(jnp.float32), jnp.maximum(labels, 0))
    return losses * counts, correct * counts, counts


@jax.custom_vjp
def _cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Cross-entropy and whether the target is the likeliest, with a gradient that is one pass over the logits.

    Differentiating a gather scatters into a second array of the logits' size, and a one-hot product reads three; both
    cost more than the vocabulary projection itself on a CPU.
    """
    return _score(logits, targets)[:2]


def _score(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    highest = logits.max(axis=-1)
    log_partition = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_partition - chosen, (chosen >= highest).astype(jnp.float32), log_partition


def _forward(logits: Array, targets: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    losses, correct, log_partition = _score(logits, targets)
    return (losses, correct), (logits, targets, log_partition)


def _backward(kept: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    logits, targets, log_partition = kept
    probabilities = jnp.exp(logits - log_partition[..., None])
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (probabilities - is_target) * cotangents[0][..., None], None


_cross_entropy.defvjp(_forward, _backward)


def _loss(vlm: Any, params: Any, adapter: Any, batch: Mapping[str, Array]) -> tuple[Float[Array, ""], Metrics]:
    losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
    total = jnp.maximum(counts.sum(), 1.0)
    loss = losses.sum() / total
    return loss, {"loss": loss, "token_accuracy": correct.sum() / total}


OBJECTIVE = Objective("sft", "maximum likelihood of the chosen answer", _loss)
