"""Local training: a scan over a client's steps with an optax optimiser, the same for every method.

Learning rates are traced and come with the round, so that a schedule or a grid of them shares one compile. What is
trained is named by path; all else in the tree (an adapter's `scale`, a frozen factor) is data.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.data.batches import IGNORED, LABELS
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.distillation import add_distillation
from fedvlm_jax.methods import Client
from fedvlm_jax.methods.base import Distillation, Metrics, is_factor
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.methods.components.training_metrics import over_steps
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives import Objective
from fedvlm_jax.utils import tree

ANSWERS = 0  # folded into a step's key for what the objective draws; dropout folds the paths of its sites


def find_rate(path: str) -> str:
    """Find which learning rate a leaf has: A's have theirs, and so have gates and all below one; all others B's.

    >>> [find_rate(path) for path in ("fc1/a", "fc1/a/3", "head/moap/gate/query", "fc1/b", "token_embedding/prompt")]
    ['a', 'a', 'a', 'b', 'b']
    """
    return "a" if leaf_name(path) in ("a", "gate") or "/gate/" in path else "b"


class LocalTrainer(NamedTuple):
    """Local training as two pure functions."""

    start: Callable[..., PyTree]  # (factors, trained) -> a fresh optimiser state for the leaves that `trained` names
    # (params, factors, optimiser state, client, rates, **choices) -> (factors, optimiser state, metrics); the choices
    # are those of `methods.base.Train`, and where it draws `key` and `tables`, of what it draws.
    run: Callable[..., tuple[PyTree, PyTree, Metrics]]
    draws: bool = False  # whether it draws random numbers, for dropout or for answers


def make_local_trainer(
    vlm: Vlm,
    objective: Objective,
    *,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    dropout: float = 0.0,
) -> LocalTrainer:
    """Make local training for a model and an objective.

    An optimiser step: the gradient over all trained factors is clipped to `clip_norm` (global norm), nudged, turned
    into a direction (AdamW 1711.05101 with optax's defaults, or the gradient itself), decayed, and scaled by the rate
    of its factor: `rates["a"]` or `rates["b"]`.

    With `dropout` each step leaves out that share of what enters A, see `lora.with_dropout`, and an objective may draw
    answers; a step's key is folded from the training's and the step's number. Without either nothing is drawn.

    The metrics are means over the steps that counted, the loss of the last of them as `last_loss`, and `steps`.
    """
    draws = dropout > 0 or objective.samples
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    rules = [optax.scale_by_adam()] if optimizer == "adamw" else []
    rules += [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    direction = optax.chain(*rules) if rules else optax.identity()

    def start(factors: PyTree, trained: Callable[[str], bool] = is_factor) -> PyTree:
        return direction.init(tree.partition(factors, trained)[0])

    def run(
        params: PyTree,
        factors: PyTree,
        state: PyTree,
        client: Client,
        rates: dict[str, Float[Array, ""]],
        *,
        trained: Callable[[str], bool] = is_factor,
        assemble: Callable[[PyTree], lora.Adapter] = lambda factors: factors,
        nudge: Callable[[PyTree], PyTree] | None = None,
        first: Int[Array, ""] | int = 0,
        distil: Distillation | None = None,
        key: PRNGKeyArray | None = None,
        tables: dict[str, Array] | None = None,
    ) -> tuple[PyTree, PyTree, Metrics]:
        if not client.indices.shape[0]:
            raise UserError("a method asks for a training of no steps at all: it needs more --train.local-steps")
        moving, frozen = tree.partition(factors, trained)
        minimised = objective.loss if distil is None else add_distillation(objective.loss, distil)

        def loss(moving: PyTree, batch: dict[str, Array], number: Sequence[Array]) -> tuple[Array, Metrics]:
            adapter = assemble(tree.combine(moving, frozen))
            if not draws:
                return minimised(vlm, params, adapter, batch)
            assert key is not None, "dropout and answers are drawn, and need a key"
            step_key = jax.random.fold_in(key, number[0])
            if dropout:
                adapter = lora.with_dropout(step_key, adapter, dropout)
            if objective.samples:
                batch = add_draws(batch, jax.random.fold_in(step_key, ANSWERS), client.number) | (tables or {})
            return minimised(vlm, params, adapter, batch)

        def descend(path: str, update: Array) -> Array:
            return -rates[find_rate(path)] * update

        def step(carry: tuple[PyTree, PyTree], at: tuple[Array, ...]) -> tuple[tuple[PyTree, PyTree], Metrics]:
            moving, state = carry
            indices, mask, *number = at
            with jax.named_scope("batch"):
                batch = {name: rows[indices] for name, rows in client.examples.items()}
                # An example that does not count loses all its labels: to every objective it is not there.
                batch |= {name: jnp.where(mask[:, None], batch[name], IGNORED) for name in LABELS if name in batch}
            (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(moving, batch, number)
            counts = mask.any()
            with jax.named_scope("optimizer"):
                metrics |= {"gradient_norm": optax.tree.norm(gradient)}
                gradient, _ = clip.update(gradient, clip.init(moving))
                if nudge is not None:
                    gradient = jax.tree.map(jnp.add, gradient, nudge(moving))
                updates: PyTree
                updates, new_state = direction.update(gradient, state, moving)
                steps_down = {path: descend(path, update) for path, update in tree.flatten(updates).items()}
                new = optax.apply_updates(moving, tree.unflatten(steps_down))
                carry = jax.tree.map(lambda new, old: jnp.where(counts, new, old), (new, new_state), (moving, state))
            steps = counts.astype(jnp.float32)
            return carry, metrics | {"last_loss": metrics["loss"] * steps, "steps": steps}

        with jax.named_scope("local_step"):
            numbers = [first + jnp.arange(len(client.indices))] if draws else []
            (moving, state), history = jax.lax.scan(step, (moving, state), (client.indices, client.mask, *numbers))
        return tree.combine(moving, frozen), state, over_steps(history)

    return LocalTrainer(start, run, draws=draws)


def add_draws(batch: dict[str, Array], key: PRNGKeyArray, client: Int[Array, ""]) -> dict[str, Array]:
    """Add to a batch what objectives that draw answers need, see `Objective.samples`."""
    rows = len(batch["labels"])
    keys = jax.random.key_data(jax.random.split(key, rows))
    return batch | {"sampling_keys": keys, "client": jnp.broadcast_to(client, (rows,))}
