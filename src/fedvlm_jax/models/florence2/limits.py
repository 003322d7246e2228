"""Bounds of what a Florence-2 configuration may say, so that nonsense is refused before anything is made of it."""

from __future__ import annotations

import math
from typing import Any

from fedvlm_jax.errors import UserError

__all__ = ["check_sizes"]

DEPTH, WIDTH, VOCABULARY = 512, 2**17, 2**24
"""Most layers of a stack, most numbers along an axis, most tokens: ten times those of any Florence-2 and far from what
memory has to be asked for."""

_TEXT = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": WIDTH,
    "decoder_attention_heads": WIDTH,
    "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "max_position_embeddings": VOCABULARY,
}
_VISION = {
    "in_channels": 3,
    "window_size": WIDTH,
    "projection_dim": WIDTH,
    "max_position_embeddings": WIDTH,
    "max_temporal_embeddings": WIDTH,
}
_STAGES = {
    "depths": (0, DEPTH),
    "patch_size": (1, 64),
    "patch_stride": (1, 64),
    "patch_padding": (0, 64),
    "embed_dim": (2, WIDTH),
    "num_heads": (1, WIDTH),
    "num_groups": (1, WIDTH),
}
_TOKENS = ("pad_token_id", "bos_token_id", "decoder_start_token_id")


def check_sizes(config: Any) -> None:
    """Refuse sizes that no model has, and tokens outside of the vocabulary.

    Args:
        config: transformers' `Florence2Config`.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    text, vision = config.text_config, config.vision_config
    for where, part, bounds in (("text_config", text, _TEXT), ("vision_config", vision, _VISION)):
        for name, most in bounds.items():
            _require(f"{where}.{name}", getattr(part, name, None), 1, most)
    if not 1 <= len(vision.depths) <= 16:
        raise UserError(f"vision_config.depths has {len(vision.depths)} stages, expected 1 to 16")
    for name, (least, most) in _STAGES.items():
        for value in getattr(vision, name):
            _require(f"vision_config.{name}", value, least, most)
    if not (math.isfinite(vision.mlp_ratio) and 0 < vision.mlp_ratio <= 64):
        raise UserError(f"vision_config.mlp_ratio is {vision.mlp_ratio}, expected more than 0 and at most 64")
    if vision.in_channels != 3:
        raise UserError(f"vision_config.in_channels is {vision.in_channels}; pictures have 3")
    _require("image_token_id", config.image_token_id, 0, text.vocab_size - 1)
    for name in _TOKENS:
        _require(f"text_config.{name}", getattr(text, name, None), 0, text.vocab_size - 1)


def _require(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
