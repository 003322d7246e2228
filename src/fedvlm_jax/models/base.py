"""The record that a vision-language model is to the rest of the package: a configuration and pure functions.

Axes: C clients, B batch, A answers, T tokens, P image tokens, D width, V vocabulary, U labels.

A *batch* is a dict of arrays:
    pixel_values    [B, H, W, 3] float32, normalised as the model's processor does; or, in its place,
    image_features  [B, P, D], what `Vlm.image_features` returned (for frozen towers: computed once and kept); if both
                    are there, these are used
    input_ids       [B, T] int32, image tokens included, as Hugging Face's model takes them
    attention_mask  [B, T] int32, 0 where padded
    memory          [B, T, D], in the place of both: what `Vlm.encode` returned of them, so that the encoder runs once
                    for several uses of its prompt; the mask is still read
    labels          [B, U] int32, -100 where ignored (decoder inputs are the labels shifted right); or
    decoder_input_ids [B, U] int32, which take precedence
Labels or decoder inputs may also be [B, A, U], several answers to each prompt. They are answered as if each were asked
alone, but the encoder runs once per prompt and its A answers share what the decoder makes of its memory.

An *adapter* is a pytree of `fedvlm_jax.lora`, or None for the bare base. The base is an argument always:
`jax.vmap` over adapters and batches with `in_axes=None` for params keeps each base matmul one over all clients' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedvlm_jax import lora
from fedvlm_jax.distributed.sharding import Cuts

Params = dict[str, Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True, eq=False, repr=False)
class Vlm:
    """A vision-language model. All functions are pure and work under jit, vmap and grad; compared by identity.

    Axes: B batch, A answers, T tokens, P image tokens, D width, V vocabulary, U labels.

    A *batch* is a dict of arrays: `pixel_values` [B, H, W, 3], or in their place `image_features` [B, P, D];
    `input_ids` and `attention_mask` [B, T], image tokens included; or in the place of all of these `memory` [B, T, D]
    beside the mask; and for logits `labels`, -100 where ignored, or `decoder_input_ids`, [B, U] or [B, A, U]. The
    module's documentation says more of each. An *adapter* is a pytree of `fedvlm_jax.lora`, or None for the bare base.

    Attributes:
        config: Hugging Face's own configuration object.
        dtype: what matmuls are computed in. Norms, softmax and logits are float32 at least.
        init: (key) -> params: random weights, float32, top level `vision_tower`, `image_projector`, `language_model`.
        image_features: (params, adapter, pixel_values [B, H, W, 3]) -> image tokens [B, P, D]. Of the adapter, only the
            part that lies in the vision tower and the projector is used.
        encode: (params, adapter, batch) -> the encoder's memory [B, T, D].
        logits: (params, adapter, batch) -> float32 logits [B, U, V], or [B, A, U, V], at the decoder's positions.
        states: (params, adapter, batch) -> the decoder's last states [B, U, D], or [B, A, U, D], and `logits` of them.
        generate: (params, adapter, batch, max_tokens, *, num_beams=None, ...) -> ids [B, max_tokens]; see
            `models.generation`.
        image_tokens: (height, width) in pixels -> number of image tokens P.
        image_width: numbers D of an image token.
        example_batch: () -> shapes of a smallest batch, to trace with.
        generation_config: transformers' `GenerationConfig`: what `generate` does where its arguments do not say
            otherwise.
        cuts: which weights devices may share, and along which axis; the others each has whole.
    """

    config: Any
    dtype: Any
    init: Callable[[Array], Params]
    image_features: Callable[[Params, Any, Array], Array]
    encode: Callable[[Params, Any, Batch], Array]
    logits: Callable[[Params, Any, Batch], Array]
    states: Callable[[Params, Any, Batch], tuple[Array, Array]]
    generate: Callable[..., Array]
    image_tokens: Callable[[int, int], int]
    image_width: int
    example_batch: Callable[[], dict[str, jax.ShapeDtypeStruct]]
    generation_config: Any
    cuts: Cuts

    def __repr__(self) -> str:
        """The model's kind and precision; configuration and functions would fill pages."""
        kind = getattr(self.config, "model_type", type(self.config).__name__)
        return f"Vlm({kind}, {jnp.dtype(self.dtype).name}, image_width={self.image_width})"

    @cached_property
    def _traced(self) -> tuple[Params, Any]:
        return lora.trace_init(self.init, jax.eval_shape(lambda: jax.random.key(0)))

    def shapes(self) -> Params:
        """The parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`s; touches no device."""
        return self._traced[0]

    @property
    def sites(self) -> Any:
        """Where an adapter can sit (`lora.Sites`), found by tracing once; touches no device."""
        return self._traced[1]
