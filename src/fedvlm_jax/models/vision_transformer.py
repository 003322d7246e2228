"""The vision transformer of SigLIP (arXiv 2010.11929, 2303.15343): patches, learned positions, pre-norm layers."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut, Cuts
from fedvlm_jax.models.layers import Norm, Stacking, activation, dot_attention, scanned


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """Sizes of a tower, as a family reads them off its configuration: pixels, numbers, heads and layers."""

    image: int
    patch: int
    width: int
    heads: int
    hidden: int
    layers: int
    activation: str
    epsilon: float
    deviation: float = 0.02


class SelfAttention(nn.Module):
    """Attention of all patches to all, with a bias in every projection."""

    vision: VisionShape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        width, heads, init = self.vision.width, self.vision.heads, nn.initializers.normal(self.vision.deviation)
        dense = partial(nn.Dense, width, dtype=self.dtype, kernel_init=init)

        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], heads, width // heads).swapaxes(1, 2)

        query, key, value = (split(dense(name=f"{name}_proj")(x)) for name in "qkv")
        return dense(name="out_proj")(dot_attention(query, key, value))


class Mlp(nn.Module):
    """Feed-forward part."""

    vision: VisionShape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(self.vision.deviation))
        wide = activation(self.vision.activation)(dense(self.vision.hidden, name="fc1")(x))
        return dense(self.vision.width, name="fc2")(wide)


class Layer(nn.Module):
    """Attention and feed-forward part, each after its norm."""

    vision: VisionShape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> tuple[Float[Array, "B P D"], None]:
        norm = partial(Norm, self.dtype, self.vision.epsilon)
        x = x + SelfAttention(self.vision, self.dtype, name="self_attn")(norm(name="layer_norm1")(x))
        return x + Mlp(self.vision, self.dtype, name="mlp")(norm(name="layer_norm2")(x)), None


class VisionTransformer(nn.Module):
    """A tower from pictures [B, H, W, 3] of one size to patch states [B, P, D], normed at the end."""

    vision: VisionShape
    dtype: Any
    stacking: Stacking

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        vision, init = self.vision, nn.initializers.normal(self.vision.deviation)
        side, step = vision.image // vision.patch, (vision.patch, vision.patch)
        conv = nn.Conv(vision.width, step, step, "VALID", dtype=self.dtype, kernel_init=init, name="patch_embedding")
        x = conv(pixels.astype(self.dtype)).reshape(len(pixels), -1, vision.width)
        positions = nn.Embed(
            side * side, vision.width, dtype=self.dtype, embedding_init=init, name="position_embedding"
        )
        x = x + positions(jnp.arange(side * side))
        x, _ = scanned(Layer, vision.layers, (), self.stacking)(vision, self.dtype, name="layers")(x)
        return Norm(self.dtype, vision.epsilon, name="post_layernorm")(x)


def cut_tower(vision: VisionShape) -> Cuts:
    """Cut a tower at `vision_tower` over devices: whole heads, and the columns and rows of its feed-forward parts."""
    layer = "vision_tower/layers/"
    return (
        Cut(rf"{layer}self_attn/(q|k|v)_proj/(kernel|bias)", (-1,), vision.heads),
        Cut(rf"{layer}self_attn/out_proj/kernel", (-2,), vision.heads),
        Cut(rf"{layer}mlp/fc1/(kernel|bias)", (-1,)),
        Cut(rf"{layer}mlp/fc2/kernel", (-2,)),
    )
