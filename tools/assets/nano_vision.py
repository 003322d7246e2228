"""First phase: the vision tower and the projector learn to tell pictures apart, with heads that are thrown away.

Two lessons are built in. Unstandardised features let what all pictures share swamp Adam's step sizes; and a rate of
1e-3 and more collapsed the features into four directions, worse than random weights. Hence the standardised pooling,
the penalty on features that repeat each other, and the gentle rate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import nano_augment
import numpy as np
from nano_corpus import Classes, Corpus, draw_epoch
from nano_speed import with_cheap_gradient
from nano_training import Pretrain, smoothed, spread_kernels, train

HEAD_WEIGHTS = {"group": 0.5, "subgroup": 1.0, "concept": 0.4, "tags": 0.3}
REPEATED_WEIGHT = 0.02  # against features that collapse into a few directions
HEAD_SPEED = 2.0  # heads learn this much faster than the tower


def train_vision(run: Pretrain, vlm: Any, params: dict, classes: Classes, corpus: Corpus, valid: Corpus) -> dict:
    """The tower and projector after the classification phase."""
    width = vlm.image_width
    heads = {
        name: {"kernel": jnp.zeros((5 * width, size)), "bias": jnp.zeros(size)} for name, size in classes.sizes.items()
    }
    tower = spread_kernels(params["vision_tower"])
    eyes = {"vision_tower": tower, "image_projector": params["image_projector"], "heads": heads}

    see = with_cheap_gradient(vlm.image_features)

    def scores(eyes: Any, pixels: Any) -> tuple[dict, Any]:
        """Every head's logits; and how far the pooled features repeat each other, which is 0 at best."""
        tokens = see({k: v for k, v in eyes.items() if k != "heads"}, None, pixels)
        # Florence-2 has a token of the mean before those of the 4x4 map.
        corners = tokens[:, -16:].reshape(-1, 2, 2, 2, 2, width).mean((2, 4)).reshape(-1, 4 * width)
        pooled = jnp.concatenate([tokens[:, 0] if tokens.shape[1] == 17 else tokens.mean(1), corners], -1)
        # Standardised over the batch: what all pictures share would swamp Adam's step sizes, and nothing is learned.
        pooled = (pooled - pooled.mean(0)) * jax.lax.rsqrt(pooled.var(0) + 1e-4)
        mean = pooled[:, :width]
        repeated = jnp.sum((mean.T @ mean / len(mean) * (1 - jnp.eye(width))) ** 2) / width
        heads = eyes["heads"].items()
        return {name: HEAD_SPEED * (pooled @ head["kernel"] + head["bias"]) for name, head in heads}, repeated

    def loss(eyes: Any, pixels: Any, rows: Any, partner: Any, weight: Any) -> tuple[Any, dict]:
        logits, repeated = scores(eyes, pixels)
        total, metrics = REPEATED_WEIGHT * repeated, {"repeated": repeated}
        for name, size in classes.sizes.items():
            target = rows[name] if name == "tags" else jax.nn.one_hot(rows[name], size)
            mixed = weight * target + (1 - weight) * target[partner]
            metrics[f"loss_{name}"] = value = smoothed(logits[name], mixed, 0.05).mean()
            total += HEAD_WEIGHTS[name] * value
        right = jnp.argmax(logits["subgroup"], -1) == rows["subgroup"]
        return total, metrics | {"train_subgroup": right.mean(dtype=jnp.float32)}

    def batches(rng: np.random.Generator, number: int) -> tuple:
        chosen = draw_epoch(run.seed, len(corpus.pixels), run.vision_batch, number)
        images = nano_augment.blend_styles(rng, corpus.pixels, chosen, corpus.peers)
        ramp = min(1.0, 2 * number / run.vision_steps[0])  # gently at first: under full augmentation nothing is learned
        images = nano_augment.augment(rng, images, run.strength * (0.2 + 0.8 * ramp))
        images, partner, weight = nano_augment.mix_pairs(rng, images, 0.25 * ramp)
        rows = {name: getattr(corpus, name)[chosen] for name in classes.sizes}
        return images, rows, partner, np.float32(weight)

    scores_jit = jax.jit(scores)

    def evaluate(eyes: Any) -> dict:
        pixels = nano_augment.normalize(valid.pixels)
        logits = [jax.device_get(scores_jit(eyes, pixels[i : i + 102])[0]) for i in range(0, len(pixels), 102)]
        return {
            f"valid_{name}": float(np.mean(np.concatenate([part[name] for part in logits]).argmax(-1) == truth))
            for name, truth in (("group", valid.group), ("subgroup", valid.subgroup))
        }

    for cycle, steps in enumerate(run.vision_steps):
        drawn = sum(run.vision_steps[:cycle])
        eyes = train(run, f"vision{cycle}", eyes, steps, run.vision_rate, loss, batches, evaluate, drawn)
    return {**params, "vision_tower": eyes["vision_tower"], "image_projector": eyes["image_projector"]}


def centre_tokens(vlm: Any, params: dict, corpus: Corpus) -> dict:
    """The last norm rescaled so that image tokens have mean 0 and deviation 1 over the training pictures: what all
    pictures share would slow the text half down as it slowed the heads.

    SmolVLM's last norm is the tower's, before a projection without bias: the projection's columns are scaled, and the
    norm's bias moves by the least that takes the mean away.
    """
    extract = jax.jit(partial(vlm.image_features, params, None))
    starts = range(0, len(corpus.pixels) - 99, 100)
    tokens = np.concatenate([extract(nano_augment.normalize(corpus.pixels[i : i + 100])) for i in starts])
    mean, deviation = tokens.mean((0, 1)), tokens.std((0, 1))
    if "proj" in params["image_projector"]:
        kernel = params["image_projector"]["proj"]["kernel"] / deviation
        norm = params["vision_tower"]["post_layernorm"]
        every = kernel.reshape(-1, len(norm["bias"]), kernel.shape[1]).sum(0)  # a bias meets every patch of a token
        bias = norm["bias"] - np.linalg.lstsq(every.T, mean / deviation)[0]
        tower = {**params["vision_tower"], "post_layernorm": {**norm, "bias": bias}}
        return {**params, "vision_tower": tower, "image_projector": {"proj": {"kernel": kernel}}}
    norm = params["image_projector"]["image_proj_norm"]
    centred = {"scale": norm["scale"] / deviation, "bias": (norm["bias"] - mean) / deviation}
    return {**params, "image_projector": {**params["image_projector"], "image_proj_norm": centred}}
