"""CLIP (arXiv 2103.00020) as a `Vlm` record: a model whose vocabulary is a list of classes.

An answer is one token, a class. Its logit is the scaled cosine of the picture's embedding and that of the class's
prompt, "a photo of a cat."; so cross-entropy of the answer is that of a classifier, and `generate` takes the largest.
The tokens of the classes' prompts are constants of a bound model. Its text tower reads them in every call, with the
adapter that it has; pictures meet it at the end alone.

A soft prompt (CoOp, arXiv 2109.01134) is added to the embeddings of the prompt's first words, so that a fresh one
changes nothing where the words are as many as its vectors. An adapter may bring several, and a head that compares
otherwise (`models.clip.heads`).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import base
from fedvlm_jax.models.base import Batch, Params, Vlm, select_leaves
from fedvlm_jax.models.clip.answers import IMAGE, SETTINGS, make_generate, make_states
from fedvlm_jax.models.clip.config import LARGEST_ENDS, check_config, read_text, read_tower
from fedvlm_jax.models.clip.heads import normalise, split_head
from fedvlm_jax.models.clip.processor import ClassProcessor
from fedvlm_jax.models.clip.weights import make_table
from fedvlm_jax.models.layers import USUAL, Norm, Stacking, scanned, widen
from fedvlm_jax.models.vision_transformer import Layer, StackShape, VisionShape, VisionTransformer, cut_tower
from fedvlm_jax.utils import tree

COMPONENTS = {
    "vision": "vision_tower/",
    "connector": "visual_projection/",
    "encoder": "text_model/(layers|final_layer_norm)/|text_projection/|logit_scale",
    "embedding": "text_model/(token|position)_embedding/",
}
TARGETS = r"text_model/layers/.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
"""Sites of adapters where a run names none: all products of the text model's layers, and none of the tower's."""

UNBOUND = (100, 16)
"""Classes, and tokens of each one's prompt, of a model that is not bound to any: what a plan reckons with."""

PROMPT_AT = "text_model/token_embedding"
"""The embedding that a soft prompt is added to."""


class TextTower(nn.Module):
    """The text model: tokens [C, T] to states [C, T, D], each of what comes before it."""

    shape: StackShape
    vocabulary: int
    positions: int
    dtype: Any
    stacking: Stacking

    def setup(self) -> None:
        shape, init = self.shape, nn.initializers.normal(self.shape.deviation)
        self.token_embedding = nn.Embed(self.vocabulary, shape.width, dtype=self.dtype, embedding_init=init)
        self.position_embedding = nn.Embed(self.positions, shape.width, dtype=self.dtype, embedding_init=init)
        self.layers = scanned(Layer, shape.layers, (), self.stacking)(shape, self.dtype)
        self.final_layer_norm = Norm(self.dtype, shape.epsilon)

    def embed(self, ids: Int[Array, "C T"]) -> Float[Array, "C T D"]:
        """Embed tokens, before their positions are added."""
        return self.token_embedding(ids)

    def __call__(self, embedded: Float[Array, "C T D"]) -> Float[Array, "C T D"]:
        x = embedded + self.position_embedding(jnp.arange(embedded.shape[1]))
        return self.final_layer_norm(self.layers(x)[0])


class Clip(nn.Module):
    """Both towers, and the space in which what they make of pictures and texts is compared.

    Attributes:
        width: of that space.
        vocabulary, positions: of the text model.
        ends: id of the token whose state a text is known by, the first of them; 2 stands for the text's largest id.
        scale: what the logarithm of the factor of cosines begins with.
    """

    vision: VisionShape
    text: StackShape
    width: int
    vocabulary: int
    positions: int
    ends: int
    scale: float
    dtype: Any
    stacking: Stacking

    def setup(self) -> None:
        self.vision_tower = VisionTransformer(self.vision, self.dtype, self.stacking)
        self.text_model = TextTower(self.text, self.vocabulary, self.positions, self.dtype, self.stacking)
        project = [
            nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(width**-0.5))
            for width in (self.vision.width, self.text.width)
        ]
        self.visual_projection, self.text_projection = project
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.scale), ())

    def image_features(self, pixel_values: Float[Array, "B H W 3"], patches: bool = False) -> Float[Array, "B P E"]:
        """Embed pictures: by their class token alone, or by it and all `patches`."""
        return self.visual_projection(self.vision_tower(pixel_values)[:, : None if patches else 1])

    def text_features(self, ids: Int[Array, "C T"]) -> Float[Array, "C E"]:
        states = self.text_model(self.text_model.embed(ids))
        last = jnp.argmax(ids if self.ends == LARGEST_ENDS else ids == self.ends, 1)
        return self.text_projection(jnp.take_along_axis(states, last[:, None, None], 1)[:, 0])

    def compare(self, batch: Batch, ids: Int[Array, "C T"]) -> dict[str, Array]:
        """Compute the memory of pictures: `state` [B, E], their embeddings of length 1, and `logits` [B, C]."""
        found = batch.get("image_features")
        features = self.image_features(batch["pixel_values"]) if found is None else found.astype(self.dtype)
        images, texts = (normalise(widen(x)) for x in (features[:, 0], self.text_features(ids)))
        return {"state": images, "logits": jnp.exp(widen(self.logit_scale)) * images @ texts.T}


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `CLIPConfig` as a record, bound to no classes; no weights are made.

    Args:
        config: of both towers.
        dtype: what matmuls are computed in; norms, softmax, cosines and logits are float32 at least.
        stacking: how its stacks of layers are run.
        generation_config: not read: an answer is the likeliest class.

    Raises:
        UserError: for a configuration that is not implemented, naming the field.
    """
    del generation_config
    return _make_record(make_module(config, dtype, stacking), config, _Asked())


def make_module(config: Any, dtype: Any, stacking: Stacking = USUAL) -> Clip:
    """Make both towers of a transformers `CLIPConfig`; arguments and errors are those of `build`."""
    check_config(config)
    text = config.text_config
    return Clip(
        vision=read_tower(config),
        text=read_text(config),
        width=config.projection_dim,
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        ends=text.eos_token_id,
        scale=float(config.logit_scale_init_value),
        dtype=dtype,
        stacking=stacking,
    )


@dataclass(frozen=True)
class _Asked:
    """The classes of a bound model, and how it asks about them.

    Attributes:
        classes: texts, by id.
        ids: tokens [C, T] of their prompts.
        prompted: the same with room for a soft prompt of so many `vectors` before every class's name.
        patches: whether image features hold those of all patches.
    """

    classes: tuple[str, ...] = ()
    ids: Int[np.ndarray, "C T"] = field(default_factory=lambda: np.zeros(UNBOUND, np.int32))
    prompted: Int[np.ndarray, "C T"] = field(default_factory=lambda: np.zeros(UNBOUND, np.int32))
    vectors: int = 0
    patches: bool = False

    def read(self, vectors: int) -> Int[np.ndarray, "C T"]:
        """Return the prompts' tokens for a soft prompt of so many vectors, 0 for none.

        Raises:
            UserError: the model was bound with room for another number of them.
        """
        if not vectors:
            return self.ids
        if not self.classes:  # a plan still reckons with a class's name
            return np.zeros((UNBOUND[0], vectors + UNBOUND[1]), np.int32)
        if vectors != self.vectors:
            raise UserError(
                f"the soft prompt has {vectors} vectors, and the classes were bound with room for {self.vectors}"
            )
        return self.prompted


def _find_prompt(adapter: lora.Adapter | None) -> Array | None:
    return tree.flatten(adapter or {}).get(f"{PROMPT_AT}/{lora.PROMPT}")


def _make_record(module: Clip, config: Any, asked: _Asked) -> Vlm:
    injected, side = lora.inject(module.apply), module.vision.image
    ids, tokens = asked.ids, module.vision.tokens if asked.patches else 1

    def select(adapter: lora.Adapter | None, keep: Callable[[bool], bool]) -> lora.Adapter | None:
        """Select leaves by whether they lie on the way from pixels to features."""
        seen = re.compile(f"{COMPONENTS['vision']}|{COMPONENTS['connector']}")
        return select_leaves(adapter, lambda path: keep(seen.match(path) is not None))

    def example_batch() -> dict[str, jax.ShapeDtypeStruct]:
        whole = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return {"pixel_values": pixels, "input_ids": whole, "attention_mask": whole, "labels": whole}

    def init(key: Array) -> Params:
        pixels = jnp.zeros((1, side, side, 3), jnp.float32)
        return dict(module.init(key, {"pixel_values": pixels}, jnp.asarray(ids), method="compare")["params"])

    def image_features(params: Params, adapter: lora.Adapter | None, pixel_values: Array) -> Array:
        seeing = select(split_head(adapter)[2], lambda seen: seen)
        return injected(params, seeing, pixel_values, asked.patches, method="image_features")

    def texts(params: Params, adapter: lora.Adapter | None) -> Float[Array, "*prompts C E"]:
        reading = select(split_head(adapter)[2], lambda seen: not seen)
        prompt = _find_prompt(reading)
        read = jnp.asarray(asked.read(0 if prompt is None else prompt.shape[-2]))

        def embed(prompt: Array | None) -> Array:
            path, flat = f"{PROMPT_AT}/{lora.PROMPT}", tree.flatten(reading or {})
            with_prompt = reading if prompt is None else tree.unflatten({**flat, path: prompt})
            return normalise(widen(injected(params, with_prompt, read, method="text_features")))

        return embed(prompt) if prompt is None or prompt.ndim == 2 else jax.vmap(embed)(prompt)

    def encode(params: Params, adapter: lora.Adapter | None, batch: Batch) -> PyTree:
        if "memory" in batch:
            return batch["memory"]
        head, leaves, towers = split_head(adapter)
        if head is not None:
            features = batch.get("image_features")
            features = image_features(params, adapter, batch["pixel_values"]) if features is None else features
            images, found = normalise(widen(features)), texts(params, adapter)
            scale = jnp.exp(widen(params["logit_scale"]))
            found = found if found.ndim == 3 else found[None]
            return {"state": images[:, 0], "logits": head(images, found, leaves, scale)}
        read = select(towers, lambda seen: not seen) if "image_features" in batch else towers
        prompt = _find_prompt(read)
        words = jnp.asarray(asked.read(0 if prompt is None else len(prompt)))
        return injected(params, read, batch, words, method="compare")

    def image_tokens(height: int, width: int) -> int:
        if (height, width) != (side, side):
            raise UserError(f"the tower takes pictures of {side}x{side} pixels, not {height}x{width}")
        return tokens

    def bind(
        processor: base.Processor, answers: Sequence[str], template: str, vectors: int = 0
    ) -> tuple[Vlm, base.Processor]:
        assert isinstance(processor, ClassProcessor)
        bound = processor.bind(answers, template, vectors)
        found = _Asked(bound.classes, bound.prompt_ids, bound.prompted_ids, vectors, asked.patches)
        return _make_record(module, config, found), bound

    # What is not there is not hashed: a model without soft prompts has the caches that it had before there were any.
    more = [asked.vectors, asked.prompted.tolist()] if asked.vectors else []
    hashed = (asked.classes, ids.tolist(), *more, *(["patches"] if asked.patches else []))
    digest = hashlib.blake2b(repr(hashed).encode(), digest_size=16).hexdigest()
    return Vlm(
        family="clip",
        config=config,
        fingerprint=f"{config.to_json_string(use_diff=False)} {digest}",
        dtype=module.dtype,
        init=init,
        image_features=image_features,
        encode=encode,
        states=make_states(encode),
        generate=make_generate(encode),
        settings=lambda: SETTINGS,
        image_tokens=image_tokens,
        image_width=module.width,
        image_token_id=IMAGE,
        vocabulary=len(ids),
        positions=module.positions,
        components=COMPONENTS,
        targets=TARGETS,
        cuts=(
            *cut_tower(module.vision),
            *cut_tower(module.text, "text_model"),
            Cut("text_model/token_embedding/embedding", (-2, -1)),
        ),
        table=make_table(config),
        write_configs=lambda folder: config.save_pretrained(folder),
        example_batch=example_batch,
        classes=asked.classes,
        bind=bind,
        prompt_at=PROMPT_AT,
        layers=("text_model/layers", "vision_tower/layers"),
        texts=texts,
        see_patches=lambda: _make_record(module, config, replace(asked, patches=True)),
    )
