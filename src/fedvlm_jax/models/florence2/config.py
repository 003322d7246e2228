"""Florence-2's configuration: read from config.json, and refused where it is not implemented or cannot be meant.

Nonsense is refused before anything is made of it, so bounds are checked of every size.
"""

import math
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.models.configuration import (
    DEPTH,
    VOCABULARY,
    WIDTH,
    check_whole,
    parse_config,
    read_positive,
    require_sizes,
)
from fedvlm_jax.models.florence2.microsoft_layout import has_layout, translate
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.layers import activation

MODEL_TYPES = ("florence2", "florence2_language")
"""The second is that of a language model alone, which is refused."""

# Sites of adapters where a run names none: all products of both stacks of the language model.
TARGETS = r"language_model/.*(encoder|decoder)/.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"

_TEXT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": VOCABULARY,
    "d_model": WIDTH,
    **{f"{side}_{name}": WIDTH for side in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")},
    **{f"{side}_layers": DEPTH for side in ("encoder", "decoder")},
}
_VISION = {
    "in_channels": 3,
    **dict.fromkeys(("window_size", "projection_dim", "max_position_embeddings", "max_temporal_embeddings"), WIDTH),
}
# Fields of vision_config that are a list, a number for each stage.
_STAGES = {
    "depths": (0, DEPTH), "patch_size": (1, 64), "patch_stride": (1, 64), "patch_padding": (0, 64),
    "embed_dim": (2, WIDTH), "num_heads": (1, WIDTH), "num_groups": (1, WIDTH),
}  # fmt: skip


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' `Florence2Config` of a config.json, also of one of Microsoft's layout.

    Raises:
        UserError: it is not Florence-2's, whole and possible.
    """
    if values["model_type"] != MODEL_TYPES[0]:
        raise UserError(f"{file} has model_type={values['model_type']!r}, expected {MODEL_TYPES[0]!r}")
    check_whole(values, file)  # before it is translated
    return parse_config(
        translate(values, file) if has_layout(values) else values, file, "Florence2Config", check_config
    )


def check_config(config: Any) -> None:
    """Refuse a `Florence2Config` that the model does not implement, with the field, its value and what it may be.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    if getattr(config, "model_type", None) != MODEL_TYPES[0]:
        raise UserError(f"expected a Florence-2 configuration, got model_type={getattr(config, 'model_type', None)!r}")
    vision, text = config.vision_config, config.text_config
    if getattr(vision, "model_type", None) != "florence_vision":
        raise UserError(f"vision_config.model_type={getattr(vision, 'model_type', None)!r} is not 'florence_vision'")
    if text.model_type != "bart":
        raise UserError(f"text_config.model_type={text.model_type!r} is not supported, only 'bart'")
    if not (config.tie_word_embeddings and text.tie_word_embeddings):
        raise UserError("tie_word_embeddings=False is not supported: input and output embeddings share one table here")
    _check_sizes(config)
    for part in (vision, text):
        activation(part.activation_function)  # for its error
    if text.d_model != vision.projection_dim:
        raise UserError(f"vision projection_dim={vision.projection_dim} must equal text d_model={text.d_model}")
    stages = {name: len(getattr(vision, name)) for name in (*_STAGES, "patch_prenorm")}
    if len(set(stages.values())) != 1:
        raise UserError(f"vision_config lists must all have one entry per stage, got lengths {stages}")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if text.d_model % (heads := getattr(text, name)):
            raise UserError(f"d_model={text.d_model} does not divide into {name}={heads}")
    for width, heads, groups in zip(vision.embed_dim, vision.num_heads, vision.num_groups, strict=True):
        if width % heads or width % groups:
            raise UserError(f"embed_dim {width} does not divide into {heads} heads and {groups} groups")


def _check_sizes(config: Any) -> None:
    """Refuse sizes that no model has, and tokens outside of the vocabulary."""
    text, vision = config.text_config, config.vision_config
    for where, part, bounds in (("text_config", text, _TEXT), ("vision_config", vision, _VISION)):
        require_sizes(where, part, bounds)
    read_positive("text_config.init_std", text.init_std)
    if not 1 <= len(vision.depths) <= 16:
        raise UserError(f"vision_config.depths has {format_count(len(vision.depths), 'stage')}, expected 1 to 16")
    for name, (least, most) in _STAGES.items():
        for value in getattr(vision, name):
            require_integer(f"vision_config.{name}", value, least, most)
    if not (math.isfinite(vision.mlp_ratio) and 0 < vision.mlp_ratio <= 64):
        raise UserError(f"vision_config.mlp_ratio is {vision.mlp_ratio}, expected more than 0 and at most 64")
    if vision.in_channels != 3:
        raise UserError(f"vision_config.in_channels is {vision.in_channels}; pictures have 3")
    require_integer("image_token_id", config.image_token_id, 0, text.vocab_size - 1)
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        require_integer(f"text_config.{name}", getattr(text, name, None), 0, text.vocab_size - 1)
