"""CLIP (arXiv 2103.00020) as a `Vlm` record: a model whose vocabulary is a list of classes.

An answer is one token, a class. Its logit is the scaled cosine of the picture's embedding and that of the class's
prompt, "a photo of a cat."; so cross-entropy of the answer is that of a classifier, and `generate` takes the largest.
The tokens of the classes' prompts are constants of a bound model. Its text tower reads them in every call, with the
adapter that it has; pictures meet it at the end alone.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
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
from fedvlm_jax.models.clip.processor import ClassProcessor
from fedvlm_jax.models.clip.weights import make_table
from fedvlm_jax.models.layers import USUAL, Norm, Stacking, scanned, widen
from fedvlm_jax.models.vision_transformer import Layer, StackShape, VisionShape, VisionTransformer, cut_tower

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

_SMALL = 1e-30  # of a squared length, so that an embedding of zeros gives zeros and not NaN


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

    def image_features(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B 1 E"]:
        return self.visual_projection(self.vision_tower(pixel_values)[:, :1])

    def text_features(self, ids: Int[Array, "C T"]) -> Float[Array, "C E"]:
        states = self.text_model(self.text_model.embed(ids))
        last = jnp.argmax(ids if self.ends == LARGEST_ENDS else ids == self.ends, 1)
        return self.text_projection(jnp.take_along_axis(states, last[:, None, None], 1)[:, 0])

    def compare(self, batch: Batch, ids: Int[Array, "C T"]) -> dict[str, Array]:
        """Compute the memory of pictures: `state` [B, E], their embeddings of length 1, and `logits` [B, C]."""
        found = batch.get("image_features")
        features = self.image_features(batch["pixel_values"]) if found is None else found.astype(self.dtype)
        images, texts = (_normalise(widen(x)) for x in (features[:, 0], self.text_features(ids)))
        return {"state": images, "logits": jnp.exp(widen(self.logit_scale)) * images @ texts.T}


def _normalise(x: Float[Array, "N E"]) -> Float[Array, "N E"]:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), _SMALL))


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
    return _make_record(make_module(config, dtype, stacking), config, np.zeros(UNBOUND, np.int32), ())


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


def _make_record(module: Clip, config: Any, ids: Int[np.ndarray, "C T"], classes: tuple[str, ...]) -> Vlm:
    injected, side = lora.inject(module.apply), module.vision.image

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
        return injected(params, select(adapter, lambda seen: seen), pixel_values, method="image_features")

    def encode(params: Params, adapter: lora.Adapter | None, batch: Batch) -> PyTree:
        if "memory" in batch:
            return batch["memory"]
        read = select(adapter, lambda seen: not seen) if "image_features" in batch else adapter
        return injected(params, read, batch, jnp.asarray(ids), method="compare")

    def image_tokens(height: int, width: int) -> int:
        if (height, width) != (side, side):
            raise UserError(f"the tower takes pictures of {side}x{side} pixels, not {height}x{width}")
        return 1

    def bind(processor: base.Processor, answers: Sequence[str], template: str) -> tuple[Vlm, base.Processor]:
        assert isinstance(processor, ClassProcessor)
        bound = processor.bind(answers, template)
        return _make_record(module, config, bound.prompt_ids, bound.classes), bound

    digest = hashlib.blake2b(repr((classes, ids.tolist())).encode(), digest_size=16).hexdigest()
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
        classes=classes,
        bind=bind,
    )
