"""LLaVA-1.5 (arXiv 2310.03744) and LLaVA-OneVision (arXiv 2408.03326) as a `Vlm` record.

A tower, CLIP's or SigLIP's, of which an inner layer's states are taken; two products; and Llama, Mistral or Qwen2.
Of LLaVA-OneVision a picture is what it is among several: one tile, and the token that ends it. The further tiles that
its own processor cuts of a single picture (anyres) are not made.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.causal_vlm import build_for_tower
from fedvlm_jax.models.layers import USUAL, Stacking, activation
from fedvlm_jax.models.llava.config import (
    check_config,
    count_image_tokens,
    has_newline,
    read_shape,
    read_tower,
    skip_states,
)
from fedvlm_jax.models.llava.weights import make_table


class Projector(nn.Module):
    """Projector of a tower's states [B, S, E] to image tokens [B, P, width]: two products, an activation between.

    Attributes:
        skipped: states that are left out, from the first.
        newline: does a learned token end the picture?
    """

    width: int
    skipped: int
    newline: bool
    activation: str
    use_bias: bool
    deviation: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B P D"]:
        init = nn.initializers.normal(self.deviation)
        dense = partial(nn.Dense, self.width, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init)
        wide = activation(self.activation)(dense(name="linear_1")(x[:, self.skipped :]))
        x = dense(name="linear_2")(wide)
        if self.newline:
            scale = nn.initializers.normal(self.width**-0.5)
            token = self.param("image_newline", scale, (self.width,)).astype(self.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(token, (len(x), 1, self.width))], 1)
        return x


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `LlavaConfig` or `LlavaOnevisionConfig` as a record; no weights are made.

    Args:
        config: with CLIP or SigLIP as tower, and Llama, Mistral or Qwen2 as text model.
        dtype: what matmuls are computed in; norms, softmax and the returned logits are float32 at least.
        stacking: how its stacks of layers are run.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.

    Raises:
        UserError: for a configuration that is not implemented, naming the field.
    """
    check_config(config)
    text, vision = read_shape(config), read_tower(config)
    projector = Projector(
        text.width, skip_states(config), has_newline(config), config.projector_hidden_act,
        config.multimodal_projector_bias, text.deviation, dtype,
    )  # fmt: skip
    return build_for_tower(
        config,
        family="llava",
        text=text,
        vision=vision,
        projector=projector,
        tokens=count_image_tokens(config),
        cuts=(
            Cut("image_projector/linear_1/(kernel|bias)", (-1,)),
            Cut("image_projector/linear_2/kernel", (-2,)),
        ),
        table=make_table(config),
        dtype=dtype,
        stacking=stacking,
        generation_config=generation_config,
    )
