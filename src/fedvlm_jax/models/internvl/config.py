"""The configuration of InternVL: read from config.json, and refused where it is not implemented."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.configuration import parse_config, read_positive, read_text_shape, read_vision_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.layers import activation
from fedvlm_jax.models.text_shape import TextShape
from fedvlm_jax.models.vision_transformer import VisionShape


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' configuration of a config.json; refuse what is not implemented."""
    config = parse_config(values, file, "InternVLConfig", check_config)
    if "tie_word_embeddings" not in values:
        # Published files say it of the text model alone, if at all; transformers 5 takes its own default then, and
        # unties the head once it sees that the file's two tensors differ.
        config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return config


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    require("config", config, {
        "downsample_ratio": (1, 0.5, 0.25), "vision_feature_layer": (-1,),
        "vision_feature_select_strategy": ("default",),
    })  # fmt: skip
    activation(config.projector_hidden_act)  # for its error
    text, tower = read_text(config), read_tower(config)
    if (side := tower.image // tower.patch) % read_factor(config):
        raise UserError(f"{side} patches a side do not divide by {read_factor(config)}, as downsample_ratio asks")
    require_integer("image_token_id", config.image_token_id, 0, text.vocabulary - 1)


def read_text(config: Any) -> TextShape:
    """Read the text model's shape.

    Raises:
        UserError: it is none of Qwen2's, or has local layers.
    """
    text = config.text_config
    require("text_config", text, {"model_type": ("qwen2",), "sliding_window": (None,)})
    rope = dict(text.rope_parameters or {})
    if rope.get("rope_type") == "dynamic":
        # Up to max_position_embeddings, beyond which no prompt goes here, these are the usual positions.
        text = SimpleNamespace(**text.to_dict() | {"rope_parameters": rope | {"rope_type": "default"}})
    shape = read_text_shape(text, tied=bool(config.tie_word_embeddings), qkv_bias=True)
    require("text_config", text, {"layer_types": (["full_attention"] * shape.layers,)})
    return shape


def read_tower(config: Any) -> VisionShape:
    """Read the tower's shape.

    Raises:
        UserError: its pictures are no squares, or it is built as InternViT-6B is.
    """
    vision = config.vision_config
    require("vision_config", vision, {
        "model_type": ("internvl_vision",), "norm_type": ("layer_norm",), "attention_bias": (True,),
        "use_qk_norm": (False,), "use_mask_token": (False,), "use_absolute_position_embeddings": (True,),
    })  # fmt: skip
    sides = {}
    for name in ("image_size", "patch_size"):
        pair = list(getattr(vision, name))
        if len(pair) != 2 or pair[0] != pair[1]:
            raise UserError(f"vision_config.{name}={pair} is not supported, only squares")
        sides[name] = pair[0]
    shape = read_vision_shape(SimpleNamespace(**vision.to_dict() | sides))
    scale = read_positive("vision_config.layer_scale_init_value", vision.layer_scale_init_value)
    return replace(shape, class_token=True, norm_last=not vision.use_mean_pooling, layer_scale=scale)


def read_factor(config: Any) -> int:
    """Read how many patches along a side become one image token."""
    return round(1 / config.downsample_ratio)


def count_image_tokens(config: Any) -> int:
    """Count the image tokens of a picture.

    >>> from transformers import InternVLConfig
    >>> config = InternVLConfig(vision_config={"image_size": 448, "patch_size": 14, "attention_bias": True})
    >>> count_image_tokens(config)
    256
    """
    tower = read_tower(config)
    return (tower.image // tower.patch // read_factor(config)) ** 2
