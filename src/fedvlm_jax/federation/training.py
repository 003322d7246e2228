"""Local training: a scan over a client's steps with an optax optimiser, the same for every method.

Learning rates are traced and come with the round, so that a schedule or a grid of them shares one compile. The
adapter's `scale` leaves are data and never trained.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora, tree
from fedvlm_jax.data.encode import IGNORED, LABELS
from fedvlm_jax.methods import Client
from fedvlm_jax.methods.record import Metrics
from fedvlm_jax.objectives import Objective

__all__ = ["LocalTrainer", "make_local_trainer"]


class LocalTrainer(NamedTuple):
    """Local training as two pure functions.

    Attributes:
        start: (adapter) -> a fresh optimiser state.
        run: (params, adapter, optimiser state, client, rates) -> (adapter, optimiser state, metrics).
    """

    start: Callable[[lora.Adapter], PyTree]
    run: Callable[..., tuple[lora.Adapter, PyTree, Metrics]]


def make_local_trainer(
    vlm: Any,
    objective: Objective,
    *,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> LocalTrainer:
    """Build local training for a model and an objective.

    An optimiser step: the gradient over all trained factors is clipped to `clip_norm` (global norm), turned into a
    direction (AdamW 1711.05101 with optax's defaults, or the gradient itself), decayed, and scaled by the rate of its
    factor: `rates["a"]` or `rates["b"]`.

    The metrics are means over the steps that counted, the loss of the last of them as `last_loss`, and `steps`.
    """
    rules = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    rules += [optax.scale_by_adam()] if optimizer == "adamw" else []
    rules += [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    direction = optax.chain(*rules) if rules else optax.identity()

    def loss(factors: PyTree, frozen: PyTree, params: PyTree, batch: dict[str, Array]) -> tuple[Array, Metrics]:
        return objective.loss(vlm, params, tree.combine(factors, frozen), batch)

    def start(adapter: lora.Adapter) -> PyTree:
        return direction.init(_split(adapter)[0])

    def run(
        params: PyTree, adapter: lora.Adapter, state: PyTree, client: Client, rates: dict[str, Float[Array, ""]]
    ) -> tuple[lora.Adapter, PyTree, Metrics]:
        factors, frozen = _split(adapter)

        def step(carry: tuple[PyTree, PyTree], at: tuple[Array, Array]) -> tuple[tuple[PyTree, PyTree], Metrics]:
            factors, state = carry
            indices, mask = at
            batch = {name: rows[indices] for name, rows in client.examples.items()}
            # An example that does not count loses all its labels: to every objective it is not there.
            batch |= {name: jnp.where(mask[:, None], batch[name], IGNORED) for name in LABELS if name in batch}
            (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(factors, frozen, params, batch)
            updates, new_state = direction.update(gradient, state, factors)
            new_factors = optax.apply_updates(factors, _descend(updates, rates))
            counts = mask.any()
            keep = lambda new, old: jnp.where(counts, new, old)  # noqa: E731
            carry = jax.tree.map(keep, (new_factors, new_state), (factors, state))
            metrics |= {"gradient_norm": optax.tree.norm(gradient), "counts": counts.astype(jnp.float32)}
            return carry, metrics

        (factors, state), history = jax.lax.scan(step, (factors, state), (client.indices, client.mask))
        return tree.combine(factors, frozen), state, _average(history)

    return LocalTrainer(start, run)


def _split(adapter: lora.Adapter) -> tuple[PyTree, PyTree]:
    """The factors, which are trained, and the scales, which are not."""
    return tree.partition(adapter, lambda path: path.rpartition("/")[2] in ("a", "b"))


def _descend(updates: PyTree, rates: dict[str, Float[Array, ""]]) -> PyTree:
    return tree.unflatten({path: -rates[path.rpartition("/")[2]] * u for path, u in tree.flatten(updates).items()})


def _average(history: Metrics) -> Metrics:
    counts = history.pop("counts")
    steps = counts.sum()
    mean = {name: jnp.sum(values * counts) / jnp.maximum(steps, 1) for name, values in history.items()}
    last = jnp.maximum(jnp.argmax(jnp.cumsum(counts)), 0)  # the first place at which the count is complete
    return {**mean, "last_loss": history["loss"][last] * counts[last], "steps": steps}
