"""The configuration of Gemma 3 and MedGemma: read from config.json, and refused where it is not implemented."""

import math
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.configuration import VOCABULARY, parse_config, read_vision_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.gemma_text import read_gemma_shape, read_local_layers
from fedvlm_jax.models.text_shape import TextShape

MODEL_TYPES = ("gemma3",)


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' configuration of a config.json; refuse what is not implemented."""
    return parse_config(values, file, "Gemma3Config", check_config)


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    text, vision = config.text_config, config.vision_config
    require("config", config, {"tie_word_embeddings": (True,)})
    wanted = {
        "model_type": ("gemma3_text",),
        "use_bidirectional_attention": (False, None),
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    }
    require("text_config", text, wanted)
    require("vision_config", vision, {"model_type": ("siglip_vision_model",)})
    read_shape(config)
    tower = read_vision_shape(vision)
    tokens, side = config.mm_tokens_per_image, tower.image // tower.patch
    require_integer("mm_tokens_per_image", tokens, 1, side * side)
    if math.isqrt(tokens) ** 2 != tokens or side % math.isqrt(tokens):
        raise UserError(f"mm_tokens_per_image={tokens} is no square whose side divides {side} patches")
    require_integer("image_token_index", config.image_token_id, 0, VOCABULARY)


def read_shape(config: Any) -> TextShape:
    """Read the text model's shape, whose queries and keys are normed."""
    text = config.text_config
    return read_gemma_shape(text, **read_local_layers(text), head_norms=True)
