"""Florence-2 (arXiv 2311.06242): DaViT, a projector with positions, and BART; built as a `Vlm` record.

A picture becomes P tokens (one for the mean, one per position of the feature map) that take the places of the image
token in the prompt. Everything runs as in inference: no dropout, no drop-path.
"""

import math
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax import lora
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.distributed.sharding import Cut, Cuts
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Batch, Params, Vlm, select_leaves
from fedvlm_jax.models.beam_search import Cache, Decoder, Settings, Step
from fedvlm_jax.models.florence2.bart import Bart
from fedvlm_jax.models.florence2.config import TARGETS, check_config
from fedvlm_jax.models.florence2.davit import DaViT
from fedvlm_jax.models.florence2.weights import make_table, temporal_embedding
from fedvlm_jax.models.generation import make_generate, read_settings
from fedvlm_jax.models.layers import USUAL, Norm, Stacking, place_features

COMPONENTS = {
    "vision": "vision_tower/",
    "connector": "image_projector/",
    "encoder": "language_model/encoder/",
    "decoder": "language_model/decoder/",
    "embedding": "language_model/shared/",
}
CUTS: Cuts = (
    Cut(r".*/(q_proj|k_proj|v_proj|qkv|fc1)/(kernel|bias)", (-1,)),
    Cut(r".*/(out_proj|proj|fc2)/kernel", (-2,)),
    Cut(r"language_model/shared/embedding", (-2, -1)),  # the vocabulary, or where it does not divide the width
)
"""Columns of the first matrix of every pair and rows of the second, so that what lies between them stays cut."""
_MEMORY_ONLY = re.compile("/encoder_attn/(k|v)_proj/")
"""Weights that the first step alone reads: they make the cross keys and values."""


def _check_map(vision: Any, height: int, width: int) -> None:
    if max(height, width) > vision.max_position_embeddings:
        raise UserError(
            f"a {height}x{width} feature map does not fit max_position_embeddings={vision.max_position_embeddings}"
        )


class Projector(nn.Module):
    """Feature map [B, h, w, D] to image tokens [B, 1 + h*w, D]: positions added, mean token first, projected, normed.

    A single picture is a film of one frame, so its temporal embedding is the first row.
    """

    vision: Any
    dtype: Any

    @nn.compact
    def __call__(self, features: Float[Array, "B h w D"]) -> Float[Array, "B P D"]:
        vision, (batch, height, width, channels) = self.vision, features.shape
        _check_map(vision, height, width)
        rows, init = vision.max_position_embeddings, nn.initializers.normal(vision.initializer_range)
        half = channels // 2
        by_row = nn.Embed(rows, half, dtype=self.dtype, embedding_init=init, name="row_embeddings")
        by_column = nn.Embed(rows, channels - half, dtype=self.dtype, embedding_init=init, name="column_embeddings")
        across = jnp.broadcast_to(by_column(jnp.arange(width))[None], (height, width, channels - half))
        down = jnp.broadcast_to(by_row(jnp.arange(height))[:, None], (height, width, half))
        time = jnp.asarray(temporal_embedding(1, channels)[0], self.dtype)
        tokens = (features + jnp.concatenate([across, down], -1) + time).reshape(batch, -1, channels)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        dense = nn.Dense(vision.projection_dim, False, self.dtype, kernel_init=init, name="image_projection")
        return Norm(self.dtype, name="image_proj_norm")(dense(tokens))


class Florence2(nn.Module):
    """The whole model; `config` is a transformers `Florence2Config`. Use it through `build`."""

    config: Any
    dtype: Any = jnp.float32
    stacking: Stacking = USUAL

    def setup(self) -> None:
        self.vision_tower = DaViT(self.config.vision_config, self.dtype, self.stacking)
        self.image_projector = Projector(self.config.vision_config, self.dtype)
        self.language_model = Bart(self.config.text_config, self.dtype, self.stacking)

    def image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        return self.image_projector(self.vision_tower(pixel_values))

    def encode(self, batch: Batch) -> Float[Array, "B T D"]:
        if "memory" in batch:
            return batch["memory"]
        ids, features = batch["input_ids"], batch.get("image_features")
        features = self.image_features(batch["pixel_values"]) if features is None else features.astype(self.dtype)
        embedded = place_features(self.language_model.embed(ids), features, ids == self.config.image_token_id)
        return self.language_model.encode(embedded, batch["attention_mask"])

    def states(self, batch: Batch) -> tuple[Float[Array, "B *A U D"], Float[Array, "B *A U V"]]:
        text = self.config.text_config
        targets = shift_right(batch["labels"], text.pad_token_id, text.decoder_start_token_id)
        return self.language_model.decode(targets, self.encode(batch), batch["attention_mask"])

    def step(
        self, ids: Int[Array, "B K"], index: Array, cache: Cache, memory: Array | None, attention_mask: Array
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K V"], Cache]:
        return self.language_model.step(ids, index, cache, memory, attention_mask)


def shift_right(labels: Int[Array, "*B U"], pad: int, start: int) -> Int[Array, "*B U"]:
    """Decoder inputs for `labels`: the start token first, everything one later, ignored labels as padding.

    >>> shift_right(jnp.asarray([[5, 6, 7, -100]]), pad=1, start=2).tolist()
    [[2, 5, 6, 7]]
    """
    shifted = jnp.concatenate([jnp.full_like(labels[..., :1], start), labels[..., :-1]], axis=-1)
    return jnp.where(shifted == IGNORED, pad, shifted)


def image_tokens(config: Any, height: int, width: int) -> int:
    """Count the image tokens P of a picture; refuse one too small for the tower's strides, or too large for positions.

    Raises:
        UserError: where the picture is smaller than the tower's strides take, or larger than it has positions for.

    >>> from fedvlm_jax.models import read_vlm
    >>> image_tokens(read_vlm("florence2-base").config, 768, 768)
    577
    """
    vision, sides = config.vision_config, (height, width)
    for kernel, stride, pad in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        sides = tuple((side + 2 * pad - kernel) // stride + 1 for side in sides)
    if min(sides) < 1:
        raise UserError(f"an image of {height}x{width} pixels leaves no features after strides {vision.patch_stride}")
    _check_map(vision, *sides)
    return 1 + math.prod(sides)


def example_batch(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the smallest complete batch: one picture, its image tokens, one label."""
    vision, side = config.vision_config, 1
    # Back from a map of one position to the least side, in pixels, that leaves it.
    strides = list(zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True))
    for kernel, stride, pad in reversed(strides):
        side = max(1, (side - 1) * stride + kernel - 2 * pad)
    ids = jax.ShapeDtypeStruct((1, image_tokens(config, side, side)), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, side, side, vision.in_channels), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids, "labels": labels}


def build(
    config: Any, *, dtype: Any = jnp.float32, stacking: Stacking = USUAL, generation_config: Any | None = None
) -> Vlm:
    """Make the Florence-2 of a transformers `Florence2Config`, as a record of pure functions; no weights are made.

    Args:
        config: with BART as text model, and tied embeddings.
        dtype: what matmuls are computed in; norms, softmax and the returned logits are float32 at least.
        stacking: how its stacks of layers are run.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.

    Raises:
        UserError: for a configuration that is not implemented, naming the field.
    """
    from transformers import GenerationConfig

    check_config(config)
    module, text = Florence2(config, dtype, stacking), config.text_config
    injected = lora.inject(module.apply)
    options = GenerationConfig.from_model_config(config) if generation_config is None else generation_config

    def select(adapter: lora.Adapter | None, *components: str) -> lora.Adapter | None:
        parts = tuple(COMPONENTS[name] for name in components)
        return select_leaves(adapter, lambda path: path.startswith(parts))

    def init(key: Array) -> Params:
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in example_batch(config).items()}
        return dict(module.init(key, zeros, method="states")["params"])

    def image_features(params: Params, adapter: lora.Adapter | None, pixel_values: Array) -> Array:
        return injected(params, select(adapter, "vision", "connector"), pixel_values, method="image_features")

    def encode(params: Params, adapter: lora.Adapter | None, batch: Batch) -> Array:
        if "memory" in batch:
            return batch["memory"]
        read = select_leaves(adapter, lambda path: not path.startswith(COMPONENTS["decoder"]))
        return injected(params, read, batch, method="encode")

    def states(params: Params, adapter: lora.Adapter | None, batch: Batch) -> tuple[Array, Array]:
        read = select(adapter, "decoder", "embedding") if "memory" in batch else adapter
        return injected(params, read, batch, method="states")

    def settings() -> Settings:
        found = read_settings(options, text, text.vocab_size)
        if found.decoder_start_token_id != text.decoder_start_token_id:
            raise UserError(
                f"answers begin after decoder_start_token_id={found.decoder_start_token_id}, and in training after "
                f"{text.decoder_start_token_id}, as config.json says"
            )
        return found

    def open_decoder(params: Params, adapter: lora.Adapter | None, batch: Batch, beams: int, length: int) -> Decoder:
        if length > text.max_position_embeddings:
            raise UserError(
                f"{length} generated tokens do not fit max_position_embeddings={text.max_position_embeddings}"
            )
        memory, mask = encode(params, adapter, batch), batch["attention_mask"]
        heads = text.decoder_attention_heads
        shape = (text.decoder_layers, memory.shape[0], beams, heads, length, text.d_model // heads)
        # Keys and values [L, B, K, H, S, d]; those of the memory [L, B, H, T, d] are filled in by the first step.
        cache = Cache((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), None)
        reading = select(adapter, "decoder", "embedding")
        later = select_leaves(reading, lambda path: not _MEMORY_ONLY.search(path))

        def first(ids: Array) -> Step:
            return injected(params, reading, ids, jnp.int32(0), cache, memory, mask, method="step")

        def step(ids: Array, position: Array, cache: Cache) -> Step:
            return injected(params, later, ids, position, cache, None, mask, method="step")

        return Decoder(memory.shape[0], first, step)

    def write_configs(folder: Path) -> None:
        config.save_pretrained(folder)
        options.save_pretrained(folder)

    return Vlm(
        family="florence2",
        config=config,
        fingerprint=config.to_json_string(use_diff=False),
        dtype=dtype,
        init=init,
        image_features=image_features,
        encode=encode,
        states=states,
        generate=make_generate(settings, open_decoder),
        settings=settings,
        image_tokens=lambda height, width: image_tokens(config, height, width),
        image_width=config.vision_config.projection_dim,
        image_token_id=config.image_token_id,
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        components=COMPONENTS,
        targets=TARGETS,
        cuts=CUTS,
        table=make_table(config),
        write_configs=write_configs,
        example_batch=lambda: example_batch(config),
    )
