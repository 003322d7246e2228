"""The configuration of PaliGemma and PaliGemma 2: read from config.json, and refused where it is not implemented."""

from pathlib import Path
from typing import Any

from fedvlm_jax.models.configuration import VOCABULARY, parse_config, read_positive, read_vision_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.gemma_text import read_gemma_shape, read_local_layers
from fedvlm_jax.models.text_shape import TextShape

MODEL_TYPES = ("paligemma",)


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' configuration of a config.json; refuse what is not implemented."""
    return parse_config(values, file, "PaliGemmaConfig", check_config)


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    text, vision = config.text_config, config.vision_config
    require("config", config, {"tie_word_embeddings": (True,)})
    require("text_config", text, {"model_type": ("gemma2", "gemma"), "use_bidirectional_attention": (True,)})
    require("vision_config", vision, {"model_type": ("siglip_vision_model",)})
    shape = read_shape(config)
    read_vision_shape(vision)
    require("config", config, {"projection_dim": (shape.width,)})
    require_integer("image_token_index", config.image_token_id, 0, VOCABULARY)


def read_shape(config: Any) -> TextShape:
    """Read the text model's shape: Gemma's, or Gemma 2's, whose scores and logits are bounded."""
    text = config.text_config
    if text.model_type == "gemma":
        return read_gemma_shape(text)
    names = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
    caps = {ours: getattr(text, name) for ours, name in names.items()}
    for ours, name in names.items():
        if caps[ours] is not None:
            read_positive(f"text_config.{name}", caps[ours])
    return read_gemma_shape(text, **read_local_layers(text), **caps)


def count_image_tokens(config: Any) -> int:
    """Count the image tokens of a picture: one to each patch.

    >>> from transformers import PaliGemmaConfig
    >>> count_image_tokens(PaliGemmaConfig())
    256
    """
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2
