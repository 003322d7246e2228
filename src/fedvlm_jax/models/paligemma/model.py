"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): a tower, one product, and Gemma, as a `Vlm` record.

All tokens of a prompt attend to each other, in local layers too; answers are causal. Transformers counts positions from
1; rotary scores depend on differences of positions alone, so they are counted from 0 here.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.causal_vlm import build_for_tower
from fedvlm_jax.models.configuration import read_vision_shape
from fedvlm_jax.models.gemma_text import PROJECTOR, make_table
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.paligemma.config import check_config, count_image_tokens, read_shape
from fedvlm_jax.models.weight_table import dense


class Projector(nn.Module):
    """Projector of patches [B, P, E] to image tokens [B, P, width]."""

    width: int
    deviation: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P D"]:
        init = nn.initializers.normal(self.deviation)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="linear")(x)


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `PaliGemmaConfig` as a record; no weights are made.

    Args:
        config: with Gemma or Gemma 2 as text model.
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
        family="paligemma",
        text=text,
        vision=vision,
        projector=Projector(text.width, text.deviation, dtype),
        tokens=count_image_tokens(config),
        cuts=(Cut("image_projector/linear/kernel", (-2,)),),
        table=make_table(*dense(f"{PROJECTOR}.linear", "image_projector/linear")),
        dtype=dtype,
        stacking=stacking,
        generation_config=generation_config,
        prompts="whole",
    )
