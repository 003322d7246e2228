"""The configuration of LLaVA and LLaVA-OneVision: read from config.json, and refused where it is not implemented."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.configuration import parse_config, read_text_shape, read_vision_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.layers import activation
from fedvlm_jax.models.text_shape import TextShape
from fedvlm_jax.models.vision_transformer import VisionShape

MODEL_TYPES = ("llava", "llava_onevision")
_CLASSES = {"llava": "LlavaConfig", "llava_onevision": "LlavaOnevisionConfig"}

_TEXTS = {
    "llama": {"attention_bias": (False,), "mlp_bias": (False,)},
    "mistral": {},
    "qwen2": {},
}
"""Text models, and what their configurations must say."""


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' configuration of a config.json; refuse what is not implemented."""
    return parse_config(values, file, _CLASSES[values["model_type"]], check_config)


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    text = config.text_config
    require("text_config", text, {"model_type": tuple(_TEXTS)})
    require("text_config", text, _TEXTS[text.model_type])
    window = getattr(text, "sliding_window", None)
    shape, tower = read_shape(config), read_tower(config)
    if window is not None and window < text.max_position_embeddings:
        raise UserError(
            f"text_config.sliding_window={window!r} is not supported, only none or one of at least "
            f"max_position_embeddings={text.max_position_embeddings}"
        )
    if set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        raise UserError(f"text_config.layer_types={text.layer_types!r} is not supported, only 'full_attention'")
    activation(config.projector_hidden_act)  # for its error
    require("config", config, {"multimodal_projector_bias": (True, False)})
    require_integer("image_token_index", config.image_token_id, 0, shape.vocabulary - 1)
    if tower.tokens <= skip_states(config):
        raise UserError("vision_feature_select_strategy='default' leaves out the tower's only state")


def read_shape(config: Any) -> TextShape:
    """Read the text model's shape."""
    text = config.text_config
    return read_text_shape(text, tied=bool(config.tie_word_embeddings), qkv_bias=text.model_type == "qwen2")


def read_tower(config: Any) -> VisionShape:
    """Read the shape of the tower, whose layers end where image tokens are taken from."""
    vision, layer = config.vision_config, config.vision_feature_layer
    require("vision_config", vision, {"model_type": ("clip_vision_model", "siglip_vision_model")})
    clip = vision.model_type == "clip_vision_model"
    whole = read_vision_shape(vision)
    # States are counted from 0, what goes into the first layer, or from the end, -1, what comes out of the last.
    require_integer("vision_feature_layer", layer, -whole.layers, whole.layers)
    count = layer if layer >= 0 else whole.layers + 1 + layer
    if count == 0:
        raise UserError("vision_feature_layer=0 is not supported: it is what goes into the tower's first layer")
    return replace(whole, layers=count, class_token=clip, patch_bias=not clip, norm_first=clip, norm_last=False)


def skip_states(config: Any) -> int:
    """Count the tower's states that are left out, from the first: the class token's, where it is no image token."""
    return int(config.vision_feature_select_strategy == "default")


def has_newline(config: Any) -> bool:
    """Does a learned token end every picture, as in LLaVA-OneVision?"""
    return config.model_type == "llava_onevision"


def count_image_tokens(config: Any) -> int:
    """Count the image tokens of a picture.

    >>> from transformers import LlavaConfig, LlavaOnevisionConfig
    >>> count_image_tokens(LlavaConfig()), count_image_tokens(LlavaOnevisionConfig())
    (576, 730)
    """
    return read_tower(config).tokens - skip_states(config) + has_newline(config)
