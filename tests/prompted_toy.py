"""A CLIP of a few hundred parameters in the shape of the toy model, for methods of models that choose among classes.

A row has the toy's six features, of which its picture is made; every label of a row is answered alike.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from transformers import CLIPConfig

from fedvlm_jax import lora
from fedvlm_jax.models.clip import build
from fedvlm_jax.models.clip.processor import ClassProcessor

CLASSES = ("red", "green", "blue", "grey", "black")
SIDE, VECTORS, EMBEDDING, END = 8, 2, 16, 31


def tokenise(texts):
    """A token a word, between one that begins and one that ends."""
    return {"input_ids": [[0, *(1 + sum(map(ord, word)) % 29 for word in text.split()), END] for text in texts]}


def make_config(layers=2):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": END + 1, "max_position_embeddings": 12, "eos_token_id": END, "bos_token_id": 0}
    vision = {**sizes, "image_size": SIDE, "patch_size": 4}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING)


def make_bound(vectors=VECTORS, template="a photo {}", patches=False):
    """-> the model bound to the classes, its processor, and weights that tell classes apart."""
    vlm = build(make_config(), dtype=jnp.float32)
    processor = ClassProcessor(tokenise, None, None, (SIDE, SIDE), 12)
    vlm, processor = (vlm.see_patches() if patches else vlm).bind(processor, CLASSES, template, vectors)
    params = jax.jit(vlm.init)(jax.random.key(0))
    wider = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if leaf.ndim < 2 or "norm" in str(path) else 8 * leaf, params
    )
    return vlm, processor, wider


def make_pixels(features):
    """Pictures [..., SIDE, SIDE, 3] of features [..., 6]."""
    tiled = jnp.tile(features, SIDE * SIDE * 3 // features.shape[-1])
    return tiled.reshape(*features.shape[:-1], SIDE, SIDE, 3)


def make_prompted(method):
    """-> model, weights and the form of adapters, for a method of this declaration."""
    vlm, _, params = make_bound(patches=method.patches)

    def logits(params, adapter, batch):
        features = batch["image_features"]
        said = vlm.logits(params, adapter, {"pixel_values": make_pixels(features), "labels": batch["labels"]})
        # Norms make something of any picture; numbers that overflow are to have no answer, as in the toy.
        return said + 0 * jnp.square(features).sum(-1).reshape(-1, *[1] * (said.ndim - 1))

    spec = lora.LoRA(
        rank=2, alpha=4.0, targets=(), prompt=VECTORS if method.prompt == "needed" else 0, prompt_at=vlm.prompt_at,
        parallel=2 if method.parallel else 0, parallel_at=vlm.layers,
    )  # fmt: skip
    parts = {"sites": vlm.sites, "component": lambda path: None, "texts": vlm.texts, "image_width": vlm.image_width}
    return SimpleNamespace(logits=logits, **parts), params, spec
