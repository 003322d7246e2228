"""Qwen3-VL (arXiv 2511.21631) and Qwen2.5-VL (arXiv 2502.13923): a tower on a grid, mergers, and a causal text model.

Rotary positions of the text model have three axes, and those of a picture are its rows and columns. Where all pictures
have one square size, positions follow from the tokens alone; where they have grids of their own, from these, too. They
are computed where they are used.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import GridVision, Vlm
from fedvlm_jax.models.causal_vlm import CausalVlm, make_record
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.qwen_vl.config import check_config, read_axes, read_shape, read_tower
from fedvlm_jax.models.qwen_vl.grid import place_tokens
from fedvlm_jax.models.qwen_vl.tower import GridShape, GridTower, Mergers, cut_grid_tower, place_on_grid
from fedvlm_jax.models.qwen_vl.weights import make_table


def build(config: Any, *, dtype: Any, stacking: Stacking = USUAL, generation_config: Any | None = None) -> Vlm:
    """Make the model of a transformers `Qwen3VLConfig` or `Qwen2_5_VLConfig` as a record; no weights are made.

    Args:
        config: the configuration.
        dtype: what matmuls are computed in; norms, softmax and the returned logits are float32 at least.
        stacking: how its stacks of layers are run.
        generation_config: transformers' `GenerationConfig`; without one, what `config` says about generation.

    Raises:
        UserError: for a configuration that is not implemented, naming the field.
    """
    check_config(config)
    text, vision = read_shape(config), read_tower(config.vision_config)
    module = CausalVlm(
        vision_tower=GridTower(vision, dtype, stacking),
        image_projector=Mergers(vision, dtype),
        text=text,
        image_token_id=config.image_token_id,
        dtype=dtype,
        stacking=stacking,
        place=partial(place_tokens, axes=read_axes(config)),
    )
    vlm = make_record(
        module,
        family=config.model_type,
        config=config,
        cuts=cut_grid_tower(vision),
        table=make_table(vision, tied=text.tied),
        image_tokens=partial(count_tokens, vision),
        side=2 * vision.patch * vision.merge,
        generation_config=generation_config,
        parts=1 + len(vision.deep),
    )
    injected = lora.inject(module.apply)
    grids = GridVision(
        pixels=(vision.patch * vision.merge) ** 2,
        patches=vision.merge**2,
        places=partial(place_on_grid, vision),
        features=lambda params, *pictures: injected(params, None, *pictures, method="grid_features"),
    )
    return replace(vlm, grids=grids)


def count_tokens(vision: GridShape, height: int, width: int) -> int:
    """Count the image tokens of a picture.

    Raises:
        UserError: its sides are not the same, or no multiples of a token's.
    """
    step = vision.patch * vision.merge
    if height != width or height % step or not height:
        raise UserError(f"the tower takes square pictures whose sides are multiples of {step}, not {height}x{width}")
    return (height // step) ** 2
