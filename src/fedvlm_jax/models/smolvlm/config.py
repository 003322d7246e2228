"""The configuration of SmolVLM and Idefics3: read from config.json, and refused where it is not implemented."""

from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.configuration import parse_config, read_text_shape, read_vision_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.text_shape import TextShape

MODEL_TYPES = ("smolvlm", "idefics3")
_CLASSES = {"smolvlm": "SmolVLMConfig", "idefics3": "Idefics3Config"}


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' configuration of a config.json; refuse what is not implemented."""
    return parse_config(values, file, _CLASSES[values["model_type"]], check_config)


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    text, vision = config.text_config, config.vision_config
    require("text_config", text, {"model_type": ("llama",), "attention_bias": (False,), "mlp_bias": (False,)})
    require("vision_config", vision, {"model_type": ("smolvlm_vision", "idefics3_vision")})
    shape, tower = read_shape(config), read_vision_shape(vision)
    require_integer("scale_factor", config.scale_factor, 1, 64)
    if (side := tower.image // tower.patch) % config.scale_factor:
        raise UserError(f"{side} patches a side do not divide by scale_factor={config.scale_factor}")
    require_integer("image_token_id", config.image_token_id, 0, shape.vocabulary - 1)


def read_shape(config: Any) -> TextShape:
    """Read the text model's shape."""
    return read_text_shape(config.text_config, tied=bool(config.tie_word_embeddings))


def count_image_tokens(config: Any) -> int:
    """Count the image tokens of a tile.

    >>> from transformers import SmolVLMConfig
    >>> count_image_tokens(SmolVLMConfig(vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4))
    64
    """
    vision = config.vision_config
    return (vision.image_size // vision.patch_size // config.scale_factor) ** 2
