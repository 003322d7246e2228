"""Distillation from a teacher beside any objective: (1 − w) F + w T² KL(teacher ‖ student), of their softened answers.

The distributions are those over the vocabulary of the logits that the objective reads, the mean over the positions
that count, as sft's cross-entropy is. T² keeps the gradient's size (arXiv 1503.02531, section 2).
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax import lora
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.methods.base import Distillation
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.models.layers import widen
from fedvlm_jax.objectives.base import Loss

LossOf = Callable[[Vlm, Params, lora.Adapter | None, Batch], Loss]


def add_distillation(loss: LossOf, distil: Distillation) -> LossOf:
    """Make the loss that also holds an adapter's answers near a teacher's; its metric is `distillation`, in nats."""

    def taught(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> Loss:
        def run(adapter: lora.Adapter | None) -> tuple[Loss, Array, Array]:
            seen: list[tuple[Array, Array]] = []

            def logits(params: Params, adapter: lora.Adapter | None, batch: Batch) -> Array:
                seen.append((vlm.logits(params, adapter, batch), batch["labels"]))
                return seen[-1][0]

            made = loss(cast(Vlm, _Listening(vlm, logits)), params, adapter, batch)
            (found,) = seen
            return made, *found

        (value, metrics), student, labels = run(adapter)
        _, teacher, _ = run(distil.teacher)
        apart = soft_divergence(jax.lax.stop_gradient(teacher), student, labels, distil.temperature)
        total = (1 - distil.weight) * value + distil.weight * apart
        return total, {**metrics, "distillation": apart}

    return taught


class _Listening:
    """A model whose logits are looked at on their way."""

    def __init__(self, vlm: Vlm, logits: Callable[..., Array]) -> None:
        self._vlm, self.logits = vlm, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)


def soft_divergence(
    teacher: Float[Array, "*batch labels vocabulary"],
    student: Float[Array, "*batch labels vocabulary"],
    labels: Int[Array, "*batch labels"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Compute T² KL(softmax(teacher / T) ‖ softmax(student / T)) in nats, the mean over positions with a label.

    >>> two = jnp.log(jnp.asarray([[0.5, 0.5], [0.9, 0.1]]))
    >>> round(float(soft_divergence(two, two[::-1], jnp.asarray([1, -100]))), 4)
    0.5108
    """
    with jax.named_scope("distillation"):
        goal, found = (jax.nn.log_softmax(widen(x) / temperature, axis=-1) for x in (teacher, student))
        apart = jnp.sum(jnp.exp(goal) * (goal - found), axis=-1)
        counts = (labels != IGNORED).astype(jnp.float32)
        return temperature**2 * jnp.sum(apart * counts) / jnp.maximum(counts.sum(), 1.0)
