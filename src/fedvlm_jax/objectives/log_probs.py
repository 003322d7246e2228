"""Log-probabilities of answers: the one place that computes them, for objectives and for evaluation.

Axes: B batch, A answers per prompt, U labels, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax import lora
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.models.layers import widen

PerLabel = Float[Array, "*batch labels"]


def token_losses(
    logits: Float[Array, "*batch labels vocabulary"], labels: Int[Array, "*batch labels"]
) -> tuple[PerLabel, PerLabel, PerLabel]:
    """Compute cross-entropy in nats, whether no token is likelier than the right one, and whether a position counts.

    Where several are the likeliest, all of them are right; in float32 that is hardly ever so. Where the label is -100
    all three are 0; elsewhere the last is 1.

    >>> [x.tolist() for x in token_losses(jnp.zeros((2, 1)), jnp.asarray([0, -100]))]
    [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    """
    with jax.named_scope("cross_entropy"):
        counts = (labels != IGNORED).astype(jnp.float32)
        # -100 is no place in the vocabulary: any other will do where the label does not count.
        losses, correct = _cross_entropy(widen(logits), jnp.maximum(labels, 0))
        return losses * counts, correct * counts, counts


def score_pairs(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Score the chosen and the rejected answer of every example, which share one pass of the prompt.

    `batch` has `rejected_labels` [B, U'] beside `labels` [B, U]; `adapter` is None for the base, DPO's reference.

    Returns:
        Per example, 0 where an answer has no label that counts: `chosen_log_prob` and `rejected_log_prob`, summed over
        the tokens, in nats; `chosen_tokens` and `rejected_tokens`, how many there are; `chosen_correct`, how many of
        the chosen answer's tokens are the likeliest at their place.
    """
    both = [batch["labels"], batch["rejected_labels"]]
    # Side by side, so that the prompt is encoded once; of one width, so that they are one array.
    width = max(labels.shape[-1] for labels in both)
    both = [jnp.pad(one, ((0, 0), (0, width - one.shape[-1])), constant_values=IGNORED) for one in both]
    labels = jnp.stack(both, axis=-2)
    losses, correct, counts = token_losses(vlm.logits(params, adapter, {**batch, "labels": labels}), labels)
    log_probs, tokens = -losses.sum(axis=-1), counts.sum(axis=-1)
    return {
        "chosen_log_prob": log_probs[..., 0],
        "rejected_log_prob": log_probs[..., 1],
        "chosen_tokens": tokens[..., 0],
        "rejected_tokens": tokens[..., 1],
        "chosen_correct": correct[..., 0, :].sum(axis=-1),
    }


# Differentiating a gather scatters into a second array of the logits' size, and a one-hot product reads three; both
# cost more than the vocabulary projection itself on a CPU. So the gradient is written out, one pass over the logits.
@jax.custom_vjp
def _cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    return _forward(logits, targets)[0]


def _forward(logits: Array, targets: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    highest = logits.max(axis=-1)
    log_partition = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    is_likeliest = (chosen >= highest).astype(jnp.float32)
    return (log_partition - chosen, is_likeliest), (logits, targets, log_partition)


def _backward(kept: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    logits, targets, log_partition = kept
    probabilities = jnp.exp(logits - log_partition[..., None])
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (probabilities - is_target) * cotangents[0][..., None], None


_cross_entropy.defvjp(_forward, _backward)
