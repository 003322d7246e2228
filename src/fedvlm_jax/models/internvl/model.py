"""InternVL (arXiv 2504.10479, 2404.16821): a tower, pixel shuffle, a projector, and Qwen2, as a `Vlm` record.

A picture is one tile, whole, brought to the tower's size: pictures are not split into tiles, of which transformers'
processor makes up to thirteen.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.causal_vlm import build_for_tower
from fedvlm_jax.models.internvl.config import check_config, count_image_tokens, read_factor, read_text, read_tower
from fedvlm_jax.models.internvl.weights import make_table
from fedvlm_jax.models.layers import USUAL, Norm, Stacking, activation


class Projector(nn.Module):
    """Join `factor` x `factor` neighbouring patches to one token, and bring it to the text model's width.

    The class token, which is the first state, is not looked at.
    """

    factor: int
    width: int
    activation: str
    deviation: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B 1+N D"]) -> Float[Array, "B P E"]:
        x, factor = x[:, 1:], self.factor
        count, patches, depth = x.shape
        side = round(patches**0.5) // factor
        x = x.reshape(count, side, factor, side, factor, depth).transpose(0, 1, 3, 2, 4, 5)
        x = Norm(self.dtype, name="layer_norm")(x.reshape(count, side * side, factor * factor * depth))
        init = nn.initializers.normal(self.deviation)
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="linear_1")(x)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="linear_2")(activation(self.activation)(x))


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `InternVLConfig` as a record; no weights are made.

    Args:
        config: with Qwen2 as text model.
        dtype: what matmuls are computed in; norms, softmax and the returned logits are float32 at least.
        stacking: how its stacks of layers are run.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.

    Raises:
        UserError: for a configuration that is not implemented, naming the field.
    """
    check_config(config)
    text = read_text(config)
    return build_for_tower(
        config,
        family="internvl",
        text=text,
        vision=read_tower(config),
        projector=Projector(read_factor(config), text.width, config.projector_hidden_act, text.deviation, dtype),
        tokens=count_image_tokens(config),
        cuts=(Cut("image_projector/linear_1/(kernel|bias)", (-1,)), Cut("image_projector/linear_2/kernel", (-2,))),
        table=make_table(text.tied),
        dtype=dtype,
        stacking=stacking,
        generation_config=generation_config,
    )
