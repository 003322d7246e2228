"""The vision transformer (arXiv 2010.11929) of SigLIP and CLIP: patches, learned positions, pre-norm layers.

Sources: SigLIP arXiv 2303.15343; CLIP arXiv 2103.00020, which has a class token before the patches and norms what goes
into the layers.
"""

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
    """Sizes of a tower, as a family reads them off its configuration: pixels, numbers, heads and layers.

    Attributes:
        image, patch: sides in pixels. What a picture has beyond whole patches is not looked at.
        layers: how many are computed, which may be fewer than a checkpoint holds.
        class_token: does a learned token stand before the patches, as CLIP has it?
        patch_bias: has the product that makes patches a bias?
        norm_first, norm_last: is what goes into the layers normed, and what comes out of them?
        deviation: of random weights.
    """

    image: int
    patch: int
    width: int
    heads: int
    hidden: int
    layers: int
    activation: str
    epsilon: float
    class_token: bool = False
    patch_bias: bool = True
    norm_first: bool = False
    norm_last: bool = True
    deviation: float = 0.02

    @property
    def tokens(self) -> int:
        """States that it makes of a picture: one for each patch, and that of the class token.

        >>> shape = {"width": 2, "heads": 1, "hidden": 2, "layers": 1, "activation": "gelu", "epsilon": 1e-5}
        >>> VisionShape(image=384, patch=14, **shape).tokens
        729
        """
        return (self.image // self.patch) ** 2 + self.class_token


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
    """A tower from pictures [B, H, W, 3] of one size to states [B, P, D]; a class token's is the first."""

    vision: VisionShape
    dtype: Any
    stacking: Stacking

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        vision, init = self.vision, nn.initializers.normal(self.vision.deviation)
        step = (vision.patch, vision.patch)
        conv = nn.Conv(
            vision.width, step, step, "VALID", use_bias=vision.patch_bias, dtype=self.dtype, kernel_init=init,
            name="patch_embedding",
        )  # fmt: skip
        patches = conv(pixels.astype(self.dtype))
        x = patches.reshape(len(pixels), -1, vision.width)
        if vision.class_token:
            token = self.param("class_embedding", init, (vision.width,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, vision.width)), x], 1)
        positions = nn.Embed(
            vision.tokens, vision.width, dtype=self.dtype, embedding_init=init, name="position_embedding"
        )
        x = x + positions(jnp.arange(vision.tokens))
        if vision.norm_first:
            x = Norm(self.dtype, vision.epsilon, name="pre_layernorm")(x)
        x, _ = scanned(Layer, vision.layers, (), self.stacking)(vision, self.dtype, name="layers")(x)
        return Norm(self.dtype, vision.epsilon, name="post_layernorm")(x) if vision.norm_last else x


def cut_tower(vision: VisionShape) -> Cuts:
    """Cut a tower at `vision_tower` over devices: whole heads, and the columns and rows of its feed-forward parts."""
    layer = "vision_tower/layers/"
    return (
        Cut(rf"{layer}self_attn/(q|k|v)_proj/(kernel|bias)", (-1,), vision.heads),
        Cut(rf"{layer}self_attn/out_proj/kernel", (-2,), vision.heads),
        Cut(rf"{layer}mlp/fc1/(kernel|bias)", (-1,)),
        Cut(rf"{layer}mlp/fc2/kernel", (-2,)),
    )
