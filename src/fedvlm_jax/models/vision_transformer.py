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
from fedvlm_jax.lora.adapter import BESIDE
from fedvlm_jax.models.layers import HIDDEN, Mlp, Norm, Stacking, dot_attention, scanned


@dataclass(frozen=True, kw_only=True)
class StackShape:
    """Sizes of a stack of layers, as a family reads them off its configuration: numbers, heads and layers.

    Attributes:
        layers: how many are computed, which may be fewer than a checkpoint holds.
        causal: does a state see only itself and those before it, as in CLIP's text model?
        deviation: of random weights.
        layer_scale: where the learned factors begin that multiply what a layer's two halves add (arXiv 2103.17239);
            None for none.
    """

    width: int
    heads: int
    hidden: int
    layers: int
    activation: str
    epsilon: float
    causal: bool = False
    deviation: float = 0.02
    layer_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class VisionShape(StackShape):
    """Sizes of a tower.

    Attributes:
        image, patch: sides in pixels. What a picture has beyond whole patches is not looked at.
        class_token: does a learned token stand before the patches, as CLIP has it?
        patch_bias: has the product that makes patches a bias?
        norm_first, norm_last: is what goes into the layers normed, and what comes out of them?
    """

    image: int
    patch: int
    class_token: bool = False
    patch_bias: bool = True
    norm_first: bool = False
    norm_last: bool = True

    @property
    def tokens(self) -> int:
        """States that it makes of a picture: one for each patch, and that of the class token.

        >>> shape = {"width": 2, "heads": 1, "hidden": 2, "layers": 1, "activation": "gelu", "epsilon": 1e-5}
        >>> VisionShape(image=384, patch=14, **shape).tokens
        729
        """
        return (self.image // self.patch) ** 2 + self.class_token


class SelfAttention(nn.Module):
    """Attention of all states to all, or to those before them, with a bias in every projection."""

    shape: StackShape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        width, heads, init = self.shape.width, self.shape.heads, nn.initializers.normal(self.shape.deviation)
        dense = partial(nn.Dense, width, dtype=self.dtype, kernel_init=init)

        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], heads, width // heads).swapaxes(1, 2)

        query, key, value = (split(dense(name=f"{name}_proj")(x)) for name in "qkv")
        seen = jnp.tri(x.shape[1], dtype=bool) if self.shape.causal else None
        bias = None if seen is None else jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)
        return dense(name="out_proj")(dot_attention(query, key, value, bias))


class Beside(nn.Module):
    """A place where an adapter may add to a layer's output what it makes of the normed input (`lora.parallel`)."""

    def __call__(self, normed: Float[Array, "B P D"], out: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        del normed
        return out


class Layer(nn.Module):
    """Attention and feed-forward part, each after its norm."""

    shape: StackShape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> tuple[Float[Array, "B P D"], None]:
        norm, start = partial(Norm, self.dtype, self.shape.epsilon), self.shape.layer_scale

        def scale(name: str, y: Array) -> Array:
            if start is None:
                return y
            return y * self.param(name, nn.initializers.constant(start), y.shape[-1:]).astype(self.dtype)

        normed = norm(name="layer_norm1")(x)
        x = x + scale("lambda_1", SelfAttention(self.shape, self.dtype, name="self_attn")(normed))
        mlp = Mlp(self.shape.hidden, self.shape.activation, self.shape.deviation, self.dtype, name="mlp")
        out = x + scale("lambda_2", mlp(norm(name="layer_norm2")(x)))
        return Beside(name=BESIDE)(normed, out), None


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


def cut_tower(shape: StackShape, path: str = "vision_tower") -> Cuts:
    """Cut the layers at `path` over devices: whole heads, and the columns and rows of their feed-forward parts."""
    layer = f"{path}/layers/"
    return (
        Cut(rf"{layer}self_attn/(q|k|v)_proj/(kernel|bias)", (-1,), shape.heads),
        Cut(rf"{layer}self_attn/out_proj/kernel", (-2,), shape.heads),
        Cut(rf"{layer}mlp/fc1/(kernel|bias)", (-1,)),
        Cut(rf"{layer}mlp/fc2/kernel", (-2,)),
    )
