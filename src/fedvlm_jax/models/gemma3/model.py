"""Gemma 3 (arXiv 2503.19786), which MedGemma is, too: a tower, pooled patches, and Gemma 3, as a `Vlm` record.

A picture's tokens attend to each other, all others to those before them. A picture is brought to the tower's size
whole; the crops of it that Gemma 3's processor can add (pan and scan) are not made.
"""

import math
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.causal_decoder import RmsNorm
from fedvlm_jax.models.causal_vlm import build_for_tower
from fedvlm_jax.models.configuration import read_vision_shape
from fedvlm_jax.models.gemma3.config import check_config, read_shape
from fedvlm_jax.models.gemma_text import PROJECTOR, make_table
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.weight_table import Rule


class Pooling(nn.Module):
    """Projector that averages squares of patches [B, N, E] to `tokens` tokens, and makes them as wide as the text's.

    Attributes:
        epsilon: of the norm between the two.
    """

    tokens: int
    width: int
    epsilon: float
    deviation: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B P D"]:
        (count, patches, depth), side = x.shape, math.isqrt(self.tokens)
        step = math.isqrt(patches) // side
        x = x.reshape(count, side, step, side, step, depth).mean((2, 4)).reshape(count, self.tokens, depth)
        x = RmsNorm(self.epsilon, self.dtype, shifted=True, name="norm")(x)
        init = nn.initializers.normal(self.deviation)
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=init, name="linear")(x)


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `Gemma3Config` as a record; no weights are made.

    Args:
        config: of a model with a tower.
        dtype: what matmuls are computed in; norms, softmax and the returned logits are float32 at least.
        stacking: how its stacks of layers are run.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.

    Raises:
        UserError: for a configuration that is not implemented, naming the field.
    """
    check_config(config)
    text, vision = read_shape(config), read_vision_shape(config.vision_config)
    return build_for_tower(
        config,
        family="gemma3",
        text=text,
        vision=vision,
        projector=Pooling(config.mm_tokens_per_image, text.width, vision.epsilon, text.deviation, dtype),
        tokens=config.mm_tokens_per_image,
        cuts=(Cut("image_projector/linear/kernel", (-2,)),),
        table=make_table(
            # A bare parameter, which is not transposed.
            Rule(f"{PROJECTOR}.mm_input_projection_weight", "image_projector/linear/kernel"),
            Rule(f"{PROJECTOR}.mm_soft_emb_norm.weight", "image_projector/norm/scale"),
        ),
        dtype=dtype,
        stacking=stacking,
        generation_config=generation_config,
        prompts="pictures",
    )
