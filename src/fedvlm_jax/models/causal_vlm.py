"""Vision-language models whose text model is a causal decoder: the module they share, and its record.

Image tokens stand in the prompt. The memory of a prompt is its keys and values in every layer, and the state after its
last token, which predicts an answer's first token; so labels hold answers alone, as for an encoder-decoder.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax import lora
from fedvlm_jax.distributed.sharding import Cut, Cuts
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Batch, Params, Vlm, select_leaves
from fedvlm_jax.models.beam_search import Cache, Decoder, Settings, Step
from fedvlm_jax.models.causal_decoder import CausalDecoder, KeysValues, Streams, TextShape, View, make_rotation
from fedvlm_jax.models.generation import make_generate, read_settings
from fedvlm_jax.models.layers import HIDDEN, Stacking, place_features
from fedvlm_jax.models.weight_table import Table

COMPONENTS = {
    "vision": "vision_tower/",
    "connector": "image_projector/",
    "decoder": "language_model/(layers|norm|lm_head)/",
    "embedding": "language_model/embed_tokens/",
}
TARGETS = r"language_model/layers/.*(q|k|v|o|gate|up|down)_proj"
"""Sites of adapters where a run names none: all products of the text model's layers, and none of the tower's."""

Memory = dict[str, Any]
"""`keys` [B, L, kv, T, d], `values` [B, L, kv, T, d], `last` [B, D]: the state after the prompt's last token."""


class CausalVlm(nn.Module):
    """A tower, a projector and a causal text model.

    Attributes:
        vision_tower: pictures [B, H, W, 3] to patch states.
        image_projector: these to image tokens [B, P, D].
        text: shape of the text model.
        image_token_id: the token whose places image tokens take.
    """

    vision_tower: nn.Module
    image_projector: nn.Module
    text: TextShape
    image_token_id: int
    dtype: Any
    stacking: Stacking

    def setup(self) -> None:
        self.language_model = CausalDecoder(self.text, self.dtype, self.stacking)

    def image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        return self.image_projector(self.vision_tower(pixel_values))

    def _open_prompts(self, batch: Batch) -> tuple[Float[Array, "B T D"], View]:
        ids, features = batch["input_ids"], batch.get("image_features")
        features = self.image_features(batch["pixel_values"]) if features is None else features.astype(self.dtype)
        embedded = place_features(self.language_model.embed(ids), features, ids == self.image_token_id)
        # Prompts are padded on the right, so a token's place in the row is its position, and causality hides padding.
        rotation = self._rotate(jnp.arange(ids.shape[1])[None])
        return embedded, View(rotation, own=_hide(jnp.tri(ids.shape[1], dtype=bool))[None, None, None])

    def _rotate(self, positions: Int[Array, "N T"]) -> Any:
        return make_rotation(positions, self.text.head_width, self.text.theta)

    def encode(self, batch: Batch) -> Memory:
        embedded, view = self._open_prompts(batch)
        (prompts, _), kept = self.language_model.run(Streams(embedded, None), (view, None))
        assert prompts is not None
        by_row = {"keys": kept.key, "values": kept.value}
        last = _take_last(prompts, batch["attention_mask"])
        return {name: jnp.moveaxis(leaf, 0, 1) for name, leaf in by_row.items()} | {"last": last}

    def states(self, batch: Batch) -> tuple[Float[Array, "B *A U D"], Float[Array, "B *A U V"]]:
        labels, mask = batch["labels"], batch["attention_mask"]
        rows, length = len(labels), labels.shape[-1]
        # The last label is nobody's input; what is ignored is embedded as token 0, and no label is predicted from it.
        inputs = self.language_model.embed(jnp.maximum(labels[..., :-1], 0).reshape(-1, length - 1))
        each = len(inputs) // rows
        positions = jnp.repeat(mask.sum(-1)[:, None] + jnp.arange(length - 1), each, 0)
        own = _hide(jnp.tri(length - 1, dtype=bool))[None, None, None]
        view = View(self._rotate(positions), own, _hide_padding(mask))
        if "memory" in batch:
            memory = batch["memory"]
            last, (_, answers) = memory["last"], self._read(memory, Streams(None, inputs), view)[0]
        else:
            embedded, prompt_view = self._open_prompts(batch)
            (prompts, answers), _ = self.language_model.run(Streams(embedded, inputs), (prompt_view, view))
            assert prompts is not None
            last = _take_last(prompts, mask)
        assert answers is not None
        first = jnp.broadcast_to(last[:, None, None], (rows, each, 1, last.shape[-1]))
        hidden = jnp.concatenate([first, answers.reshape(rows, each, length - 1, -1)], 2)
        states, logits = self.language_model.head(hidden)
        return states.reshape(*labels.shape, -1), logits.reshape(*labels.shape, -1)

    def _read(
        self, memory: Memory, streams: Streams, view: View, beams: KeysValues | None = None
    ) -> tuple[Streams, KeysValues]:
        prompt = KeysValues(*(jnp.moveaxis(memory[name], 1, 0) for name in ("keys", "values")))
        return self.language_model.run(streams, (None, view), prompt, beams)

    def first(self, memory: Memory) -> tuple[Float[Array, "B 1 D"], Float[Array, "B 1 V"]]:
        """What the prompt alone predicts."""
        return self.language_model.head(memory["last"][:, None])

    def step(
        self, ids: Int[Array, "B K"], index: Array, beams: KeysValues, memory: Memory, mask: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K V"], KeysValues]:
        """One token of every beam, before which `index` were generated; beams' keys are [L, B, K, kv, S, d]."""
        rows, count = ids.shape
        positions = jnp.repeat(mask.sum(-1)[:, None] + index, count, 0)
        view = View(self._rotate(positions), prompt=_hide_padding(mask), place=index)
        embedded = self.language_model.embed(ids).reshape(rows * count, 1, -1)
        (_, answers), beams = self._read(memory, Streams(None, embedded), view, beams)
        assert answers is not None
        return *self.language_model.head(answers.reshape(rows, count, -1)), beams


def _hide(seen: Array) -> Array:
    """Numbers to add to scores: 0 where a key is seen."""
    return jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)


def _hide_padding(mask: Int[Array, "B T"]) -> Float[Array, "B 1 1 1 1 T"]:
    return _hide(mask != 0)[:, None, None, None, None]


def _take_last(prompts: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """The state after each prompt's last token; of a row without any, that of its first padding."""
    last = jnp.maximum(mask.sum(-1) - 1, 0)
    return jnp.take_along_axis(prompts, last[:, None, None], 1)[:, 0]


def cut_text(text: TextShape) -> Cuts:
    """Cut the text model over devices: whole heads, the columns of a pair's first matrix and the rows of its second."""
    layer = "language_model/layers/"
    return (
        Cut(rf"{layer}self_attn/q_proj/(kernel|bias)", (-1,), text.heads),
        # Where heads of keys do not divide, every device has them whole.
        Cut(rf"{layer}self_attn/(k|v)_proj/(kernel|bias)", (-1,), text.kv_heads),
        Cut(rf"{layer}self_attn/o_proj/kernel", (-2,), text.heads),
        Cut(rf"{layer}mlp/(gate|up)_proj/kernel", (-1,)),
        Cut(rf"{layer}mlp/down_proj/kernel", (-2,)),
        Cut("language_model/embed_tokens/embedding", (-2, -1)),
        *([] if text.tied else [Cut("language_model/lm_head/kernel", (-1, -2))]),
    )


def check_generation(options: Any) -> None:
    """Refuse what counts the prompt's tokens too in a decoder-only model of transformers, and here would not.

    Raises:
        UserError: naming the option.
    """
    for name in ("no_repeat_ngram_size", "min_length", "forced_bos_token_id"):
        if value := getattr(options, name, None):
            raise UserError(f"generation option {name}={value!r} is not implemented for a decoder-only model; leave it")


def make_record(
    module: CausalVlm, *, family: str, config: Any, positions: int, cuts: Cuts, table: Table,
    image_tokens: Callable[[int, int], int], side: int, generation_config: Any | None,
) -> Vlm:  # fmt: skip
    """Make the record of a model.

    Args:
        config: transformers' configuration, with a `text_config`.
        positions: most tokens of prompt and answer together.
        cuts: of the tower; the text model's are added.
        image_tokens: as the record has it.
        side: pixels of a picture's side, for the smallest batch.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.
    """
    from transformers import GenerationConfig

    text, injected = module.text, lora.inject(module.apply)
    options = GenerationConfig.from_model_config(config) if generation_config is None else generation_config

    def select(adapter: lora.Adapter | None, *components: str) -> lora.Adapter | None:
        return select_leaves(adapter, lambda path: any(re.match(COMPONENTS[name], path) for name in components))

    def example_batch() -> dict[str, jax.ShapeDtypeStruct]:
        ids = jax.ShapeDtypeStruct((1, image_tokens(side, side) + 1), jnp.int32)
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        labels = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids, "labels": labels}

    def init(key: Array) -> Params:
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in example_batch().items()}
        return dict(module.init(key, zeros, method="states")["params"])

    def image_features(params: Params, adapter: lora.Adapter | None, pixel_values: Array) -> Array:
        return injected(params, select(adapter, "vision", "connector"), pixel_values, method="image_features")

    def encode(params: Params, adapter: lora.Adapter | None, batch: Batch) -> Memory:
        if "memory" in batch:
            return batch["memory"]
        read = select_leaves(adapter, lambda path: not path.startswith("language_model/lm_head/"))
        return injected(params, read, batch, method="encode")

    def states(params: Params, adapter: lora.Adapter | None, batch: Batch) -> tuple[Array, Array]:
        read = select(adapter, "decoder", "embedding") if "memory" in batch else adapter
        return injected(params, read, batch, method="states")

    def settings() -> Settings:
        check_generation(options)
        return read_settings(options, config.text_config, text.vocabulary)

    def open_decoder(params: Params, adapter: lora.Adapter | None, batch: Batch, beams: int, length: int) -> Decoder:
        memory, mask = encode(params, adapter, batch), batch["attention_mask"]
        if mask.shape[1] + length > positions:
            raise UserError(f"{mask.shape[1]} prompt tokens and {length} generated do not fit {positions} positions")
        rows, dtype = len(mask), module.dtype
        shape = (text.layers, rows, beams, text.kv_heads, length, text.head_width)
        heading = select_leaves(adapter, lambda path: path.startswith(_HEAD[text.tied]))
        reading = select(adapter, "decoder", "embedding")

        def first(ids: Array) -> Step:
            del ids  # the place of a start token, which these models do not have
            states, logits = injected(params, heading, memory, method="first")
            empty = Cache((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), memory)
            return jnp.repeat(states, beams, 1), jnp.repeat(logits, beams, 1), empty

        def step(ids: Array, position: Array, cache: Cache) -> Step:
            kept = KeysValues(*cache.beams)
            hidden, logits, kept = injected(params, reading, ids, position - 1, kept, cache.prompt, mask, method="step")
            return hidden, logits, cache._replace(beams=tuple(kept))

        return Decoder(rows, first, step)

    def write_configs(folder: Path) -> None:
        config.save_pretrained(folder)
        options.save_pretrained(folder)

    return Vlm(
        family=family,
        config=config,
        fingerprint=config.to_json_string(use_diff=False),
        dtype=module.dtype,
        init=init,
        image_features=image_features,
        encode=encode,
        states=states,
        generate=make_generate(settings, open_decoder),
        settings=settings,
        image_tokens=image_tokens,
        image_width=text.width,
        image_token_id=module.image_token_id,
        vocabulary=text.vocabulary,
        positions=positions,
        shared_positions=True,
        components=COMPONENTS,
        targets=TARGETS,
        cuts=(*cuts, *cut_text(text)),
        table=table,
        write_configs=write_configs,
        example_batch=example_batch,
    )


_HEAD = {True: "language_model/embed_tokens/", False: "language_model/lm_head/"}
"""Whether the table is tied -> the path of what makes logits."""
