"""SmolVLM (arXiv 2504.05299) and Idefics3 (arXiv 2408.12637): a tower, pixel shuffle, and Llama, as a `Vlm` record.

A picture is one tile, whole, brought to the tower's size: pictures are not split into tiles, of which transformers'
processor makes up to seventeen.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.causal_vlm import build_for_tower
from fedvlm_jax.models.configuration import read_vision_shape
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.smolvlm.config import check_config, count_image_tokens, read_shape
from fedvlm_jax.models.smolvlm.weights import make_table


class PixelShuffle(nn.Module):
    """Projector that joins `factor` x `factor` neighbouring patches [B, P·factor², D] to one token [B, P, width]."""

    factor: int
    width: int
    deviation: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B P E"]:
        (count, patches, depth), factor = x.shape, self.factor
        side = round(patches**0.5) // factor
        x = x.reshape(count, side, factor, side, factor, depth).transpose(0, 1, 3, 2, 4, 5)
        init = nn.initializers.normal(self.deviation)
        dense = nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=init, name="proj")
        return dense(x.reshape(count, side * side, factor * factor * depth))


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `SmolVLMConfig` or `Idefics3Config` as a record; no weights are made.

    Args:
        config: with Llama as text model.
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
        family="smolvlm",
        text=text,
        vision=vision,
        projector=PixelShuffle(config.scale_factor, text.width, text.deviation, dtype),
        tokens=count_image_tokens(config),
        cuts=(Cut("image_projector/proj/kernel", (-2,)),),
        table=make_table(text.tied),
        dtype=dtype,
        stacking=stacking,
        generation_config=generation_config,
    )
