"""CLIP's configuration: read from config.json, and refused where it is not implemented."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.configuration import VOCABULARY, WIDTH, parse_config, read_stack, read_vision_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.vision_transformer import StackShape, VisionShape

MODEL_TYPES = ("clip",)
LARGEST_SCALE = 50
"""Of the scale's logarithm; CLIP's begins with 2.66 and ends with 4.61."""
LARGEST_ENDS = 2
"""The `eos_token_id` of older configurations, under which the largest id of a text ends it, whatever its number."""


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' `CLIPConfig` of a config.json; refuse what is not implemented."""
    return parse_config(values, file, "CLIPConfig", check_config)


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    text = config.text_config
    require("text_config", text, {"model_type": ("clip_text_model",)})
    require("vision_config", config.vision_config, {"model_type": ("clip_vision_model",)})
    read_tower(config)
    read_text(config)
    require_integer("projection_dim", config.projection_dim, 1, WIDTH)
    scale = config.logit_scale_init_value
    if not isinstance(scale, int | float) or not abs(scale) <= LARGEST_SCALE:
        raise UserError(
            f"logit_scale_init_value is {scale!r}, expected a number from -{LARGEST_SCALE} to {LARGEST_SCALE}"
        )
    require_integer("text_config.vocab_size", text.vocab_size, 1, VOCABULARY)
    require_integer("text_config.max_position_embeddings", text.max_position_embeddings, 4, VOCABULARY)
    if text.eos_token_id != LARGEST_ENDS:
        require_integer("text_config.eos_token_id", text.eos_token_id, 0, text.vocab_size - 1)


def read_tower(config: Any) -> VisionShape:
    """Read the shape of the tower of pictures."""
    return replace(read_vision_shape(config.vision_config), class_token=True, patch_bias=False, norm_first=True)


def read_text(config: Any) -> StackShape:
    """Read the shape of the text model's layers."""
    return StackShape(**read_stack("text_config", config.text_config), causal=True)
