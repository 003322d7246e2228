"""Answers of one token, a class: how they are predicted and generated from the memory of a picture.

The memory holds all that an answer needs, so nothing is computed here but the largest logit.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Batch, Params
from fedvlm_jax.models.beam_search import Settings
from fedvlm_jax.models.generation import Amend

IMAGE, END = 2**24, 2**24 + 1
"""Ids that stand for a picture in a prompt, and behind an answer: no classes, however many there are."""

SETTINGS = Settings(
    num_beams=1, decoder_start_token_id=END, pad_token_id=END, eos_token_ids=(END,), forced_bos_token_id=None,
    forced_eos_token_ids=(), no_repeat_ngram_size=0, min_length=0, min_new_tokens=0, length_penalty=1.0,
    early_stopping=False,
)  # fmt: skip
"""How answers are generated: by the largest logit."""

Encode = Callable[[Params, PyTree, Batch], PyTree]
"""(params, adapter, batch) -> `state` [B, E] and `logits` [B, C] of every picture."""


def make_states(encode: Encode) -> Callable[[Params, PyTree, Batch], tuple[Array, Array]]:
    """Make the `states` of a model: the same for every label, for none depends on one before it."""

    def states(params: Params, adapter: PyTree, batch: Batch) -> tuple[Array, Array]:
        memory, shape = encode(params, adapter, batch), batch["labels"].shape

        def spread(x: Array) -> Array:
            return jnp.broadcast_to(x.reshape(len(x), *[1] * (len(shape) - 1), -1), (*shape, x.shape[-1]))

        return spread(memory["state"]), spread(memory["logits"])

    return states


def make_generate(encode: Encode) -> Callable[..., Array]:
    """Make the `generate` of a model; arguments and errors are those of `models.generation`'s."""

    @partial(jax.jit, static_argnames=("length", "amend"))
    def run(
        params: Params, adapter: PyTree, batch: Batch, datastore: PyTree, length: int, amend: Amend | None
    ) -> Int[Array, "B U"]:
        memory = encode(params, adapter, batch)
        states, logits = memory["state"][:, None], memory["logits"][:, None]
        chosen = jnp.argmax(logits if amend is None else amend(datastore, states, logits), -1)
        return jnp.pad(chosen.astype(jnp.int32), ((0, 0), (0, length - 1)), constant_values=END)

    def generate(
        params: Params, adapter: PyTree, batch: Batch, max_tokens: int, *, num_beams: int | None = None,
        amend: Amend | None = None, datastore: PyTree = None, **options: Any,
    ) -> Int[Array, "B U"]:  # fmt: skip
        if unknown := options.keys() - {field.name for field in fields(Settings)}:
            raise UserError(f"generate does not know {', '.join(sorted(unknown))}")
        if max_tokens < 1 or (num_beams is not None and num_beams < 1):
            raise UserError(f"max_tokens={max_tokens} and num_beams={num_beams} must both be at least 1")
        batch = {name: value for name, value in batch.items() if name != "labels"}
        return run(params, adapter, batch, datastore, max_tokens, amend)

    return generate
