"""Vision-language models whose text model is a causal decoder: the module they share, and its record.

Image tokens stand in the prompt. The memory of a prompt is its keys and values in every layer, and the state after its
last token, which predicts an answer's first token; so labels hold answers alone, as for an encoder-decoder.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedvlm_jax import lora
from fedvlm_jax.distributed.sharding import Cuts
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Batch, Params, Vlm, select_leaves
from fedvlm_jax.models.beam_search import Cache, Decoder, Settings, Step
from fedvlm_jax.models.causal_decoder import CausalDecoder, KeysValues, Streams, View, Views, make_rotation
from fedvlm_jax.models.generation import check_generation, make_generate, read_settings
from fedvlm_jax.models.layers import HIDDEN, Stacking, place_features, take_last
from fedvlm_jax.models.text_shape import Reach, TextShape, cut_text
from fedvlm_jax.models.vision_transformer import VisionShape, VisionTransformer, cut_tower
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
"""`keys` [B, L, kv, T, d] and `values` [B, L, kv, T, d]; `last` [B, D]: the state after the prompt's last token; `next`
[B]: the position that follows it."""


class CausalVlm(nn.Module):
    """A tower, a projector and a causal text model.

    Attributes:
        vision_tower: pictures [B, H, W, 3] to patch states.
        image_projector: these to image tokens [B, P, D]; or [B, P, (1 + K)·D], of which K parts after the first are
            added to the tokens' states, one after each of the text model's first K layers (arXiv 2406.04334).
        text: shape of the text model.
        image_token_id: the token whose places image tokens take.
        place: (is image token [B, T], P of a picture, or their grids [B, N, 2]) -> a position of every token, or one
            for each frequency [B, T, F], as rotary positions on a grid have; None where a token's place in its row is
            its position.
        prompts: which tokens of a prompt attend to later ones: none, those of a picture to all of its own, or all.
    """

    vision_tower: nn.Module
    image_projector: nn.Module
    text: TextShape
    image_token_id: int
    dtype: Any
    stacking: Stacking
    place: Callable[[Array, Any], Array] | None = None
    prompts: Literal["causal", "pictures", "whole"] = "causal"

    def setup(self) -> None:
        self.language_model = CausalDecoder(self.text, self.dtype, self.stacking)

    def image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        return self.image_projector(self.vision_tower(pixel_values))

    def grid_features(self, patches: Float[Array, "B N F"], places: Any) -> Float[Array, "B P D"]:
        """Read pictures on grids of their own, where the tower does (`GridVision`)."""
        return self.image_projector(self.vision_tower(patches, places))

    def _open_prompts(self, batch: Batch) -> tuple[Float[Array, "B T D"], tuple[View, ...], Int[Array, " B"]]:
        """Embed prompts; also their views for every kind of layer, and the positions that follow them."""
        ids, mask, features = batch["input_ids"], batch["attention_mask"], batch.get("image_features")
        if features is None:
            pixels = batch["pixel_values"]
            features = self.image_features(pixels.reshape(-1, *pixels.shape[-3:]))
            features = features.reshape(*pixels.shape[:-3], *features.shape[-2:])
        features = features.astype(self.dtype)
        tokens = features.shape[-2]
        features = features.reshape(len(ids), -1, features.shape[-1])  # of all pictures in a row
        is_image = ids == self.image_token_id
        first, *others = jnp.split(features, features.shape[-1] // self.text.width, -1)
        embedded = place_features(self.language_model.embed(ids), first, is_image)
        blank = jnp.zeros_like(embedded)
        added = jnp.stack([place_features(blank, part, is_image) for part in others]) if others else None
        # Prompts are padded on the right, so a token's place in the row is its position, pictures on a grid apart.
        places, following = jnp.arange(ids.shape[1])[None], mask.sum(-1)
        if self.place is not None:
            places = self.place(is_image, batch.get("image_grids", tokens))
            following = 1 + jnp.max(places * mask[..., None], (1, 2))

        def view(reach: Reach) -> View:
            own = _hide(self._see(batch, reach.window))[:, None, None]
            return View(self._rotate(places, reach), own, added=added)

        return embedded, tuple(map(view, self.text.reaches)), following

    def _see(self, batch: Batch, window: int | None) -> Bool[Array, "B T T"]:
        """Say which tokens of a prompt each attends to; axes over which nothing differs have length 1."""
        ids = batch["input_ids"]
        if self.prompts == "whole":  # within a prompt there is no window
            return (batch["attention_mask"] != 0)[:, None]
        seen = jnp.tri(ids.shape[1], dtype=bool)[None]  # which hides padding, too: it comes after all tokens
        if self.prompts == "pictures":
            is_image = ids == self.image_token_id
            begins = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
            picture = jnp.where(is_image, jnp.cumsum(begins, 1), 0)
            seen |= (picture[:, :, None] == picture[:, None]) & is_image[:, None]
        places = jnp.arange(ids.shape[1])
        return seen & _near(places[:, None], places, window)

    def _view_answers(
        self, mask: Int[Array, "B T"], following: Int[Array, " B"], offsets: Int[Array, " U"], answers: int,
        cached: int | None = None,
    ) -> tuple[View, ...]:  # fmt: skip
        """Make the views of answers' tokens that are so many after their prompt's end, for every kind of layer.

        `following`: positions after the prompts. `answers`: A to each prompt. `cached`: room of the cache, where only
        one token is not in it yet.
        """
        positions = mask.sum(-1)[:, None] + offsets
        others = offsets if cached is None else jnp.arange(cached)
        before = others <= offsets[:, None]

        def view(reach: Reach) -> View:
            rotation = self._rotate(jnp.repeat(following[:, None] + offsets, answers, 0), reach)
            own = _hide(before & _near(offsets[:, None], others, reach.window))[None, None, None]
            seen = (mask != 0)[:, None] & _near(positions[:, :, None], jnp.arange(mask.shape[1]), reach.window)
            place = None if cached is None else offsets[0]
            return View(rotation, own, _hide(seen)[:, None, None, None], place)

        return tuple(map(view, self.text.reaches))

    def _rotate(self, positions: Int[Array, "N T *F"], reach: Reach) -> Any:
        return make_rotation(positions, self.text.head_width, reach.theta, reach.factor)

    def encode(self, batch: Batch) -> Memory:
        embedded, views, following = self._open_prompts(batch)
        (prompts, _), kept = self.language_model.run(Streams(embedded, None), tuple((view, None) for view in views))
        assert prompts is not None
        keys, values = (jnp.moveaxis(leaf, 0, 1) for leaf in kept)
        last = take_last(prompts, batch["attention_mask"])
        return {"keys": keys, "values": values, "last": last, "next": following}

    def states(self, batch: Batch) -> tuple[Float[Array, "B *A U D"], Float[Array, "B *A U V"]]:
        labels, mask = batch["labels"], batch["attention_mask"]
        rows, length = len(labels), labels.shape[-1]
        # The last label is nobody's input; what is ignored is embedded as token 0, and no label is predicted from it.
        inputs = self.language_model.embed(jnp.maximum(labels[..., :-1], 0).reshape(-1, length - 1))
        each = len(inputs) // rows
        offsets = jnp.arange(length - 1)
        if "memory" in batch:
            memory = batch["memory"]
            views = self._view_answers(mask, memory["next"], offsets, each)
            last, (_, answers) = memory["last"], self._read(memory, Streams(None, inputs), views)[0]
        else:
            embedded, prompt_views, following = self._open_prompts(batch)
            views = self._view_answers(mask, following, offsets, each)
            both = tuple(zip(prompt_views, views, strict=True))
            (prompts, answers), _ = self.language_model.run(Streams(embedded, inputs), both)
            assert prompts is not None
            last = take_last(prompts, mask)
        assert answers is not None
        first = jnp.broadcast_to(last[:, None, None], (rows, each, 1, last.shape[-1]))
        hidden = jnp.concatenate([first, answers.reshape(rows, each, length - 1, -1)], 2)
        states, logits = self.language_model.head(hidden)
        return states.reshape(*labels.shape, -1), logits.reshape(*labels.shape, -1)

    def _read(
        self, memory: Memory, streams: Streams, views: tuple[View, ...], beams: KeysValues | None = None
    ) -> tuple[Streams, KeysValues]:
        prompt = KeysValues(*(jnp.moveaxis(memory[name], 1, 0) for name in ("keys", "values")))
        pairs: tuple[Views, ...] = tuple((None, view) for view in views)
        return self.language_model.run(streams, pairs, prompt, beams)

    def first(self, memory: Memory) -> tuple[Float[Array, "B 1 D"], Float[Array, "B 1 V"]]:
        """What the prompt alone predicts."""
        return self.language_model.head(memory["last"][:, None])

    def step(
        self, ids: Int[Array, "B K"], index: Array, beams: KeysValues, memory: Memory, mask: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K V"], KeysValues]:
        """One token of every beam, before which `index` were generated; beams' keys are [L, B, K, kv, S, d]."""
        rows, count = ids.shape
        views = self._view_answers(mask, memory["next"], jnp.asarray(index)[None], count, beams.key.shape[-2])
        embedded = self.language_model.embed(ids).reshape(rows * count, 1, -1)
        (_, answers), beams = self._read(memory, Streams(None, embedded), views, beams)
        assert answers is not None
        return *self.language_model.head(answers.reshape(rows, count, -1)), beams


def _hide(seen: Array) -> Array:
    """Numbers to add to scores: 0 where a key is seen."""
    return jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)


def _near(token: Array, other: Array, window: int | None) -> Any:
    """Say whether a place is in the window of another; True without a window."""
    return True if window is None else token - other < window


def make_record(
    module: CausalVlm, *, family: str, config: Any, cuts: Cuts, table: Table, image_tokens: Callable[[int, int], int],
    side: int, generation_config: Any | None, parts: int = 1,
) -> Vlm:  # fmt: skip
    """Make the record of a model.

    Args:
        config: transformers' configuration, with a `text_config`.
        cuts: of the tower; the text model's are added.
        image_tokens: as the record has it.
        side: pixels of a picture's side, for the smallest batch.
        parts: how often an image token has the text model's width.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.
    """
    from transformers import GenerationConfig

    text, injected, positions = module.text, lora.inject(module.apply), config.text_config.max_position_embeddings
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
        return read_settings(options, config.text_config, text.vocabulary, ignore_sampling=True, start=0)

    def open_decoder(params: Params, adapter: lora.Adapter | None, batch: Batch, beams: int, length: int) -> Decoder:
        memory, mask = encode(params, adapter, batch), batch["attention_mask"]
        if mask.shape[1] + length > positions:
            raise UserError(f"{mask.shape[1]} prompt tokens and {length} generated do not fit {positions} positions")
        rows, dtype = len(mask), module.dtype
        shape = (text.layers, rows, beams, text.kv_heads, length, text.head_width)
        head = "embed_tokens" if text.tied else "lm_head"
        heading = select_leaves(adapter, lambda path: path.startswith(f"language_model/{head}/"))
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
        image_width=parts * text.width,
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


def build_for_tower(
    config: Any, *, family: str, text: TextShape, vision: VisionShape, projector: nn.Module, tokens: int, cuts: Cuts,
    table: Table, dtype: Any, stacking: Stacking, generation_config: Any | None,
    prompts: Literal["causal", "pictures", "whole"] = "causal",
) -> Vlm:  # fmt: skip
    """Make the record of a model whose tower is a `VisionTransformer`, so that all pictures have its size.

    Args:
        config: transformers' configuration, with a `text_config`.
        projector: from the tower's states to image tokens.
        tokens: image tokens of a picture.
        cuts: of the projector; the tower's and the text model's are added.
        prompts: as `CausalVlm` has it.
        generation_config: as for `make_record`.
    """

    def image_tokens(height: int, width: int) -> int:
        if (height, width) != (vision.image, vision.image):
            raise UserError(f"the tower takes pictures of {vision.image}x{vision.image} pixels, not {height}x{width}")
        return tokens

    module = CausalVlm(
        vision_tower=VisionTransformer(vision, dtype, stacking),
        image_projector=projector,
        text=text,
        image_token_id=config.image_token_id,
        dtype=dtype,
        stacking=stacking,
        prompts=prompts,
    )
    return make_record(
        module, family=family, config=config, cuts=(*cut_tower(vision), *cuts), table=table, image_tokens=image_tokens,
        side=vision.image, generation_config=generation_config,
    )  # fmt: skip
