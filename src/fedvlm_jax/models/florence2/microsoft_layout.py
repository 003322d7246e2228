"""Florence-2's folders as Microsoft published them: other fields, tensor names and tokens than transformers'.

Such a folder names code of its own (`auto_map`), which is not run: its configuration is translated, its tensors are
found by their names, and its tokenizer gets the tokens that its code would add. Pictures stand before the text without
a token in the vocabulary; here BART's `<mask>`, which Florence-2 never reads or writes, holds their places.

Source of names and order: transformers' `convert_florence2_original_pytorch_to_hf.py`, and the `Florence2Processor`
that Microsoft published.
"""

from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.weight_table import Rule

IMAGE, IMAGE_ID = "<mask>", 50264
"""The token in whose places image tokens are put, and its id in BART's vocabulary."""

_PAIRS = ("cap", "ncap", "dcap", "grounding", "seg"), ("region_cap", "region_to_desciption", "proposal", "poly")
TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{number}>" for number in range(1000)),
    *(token for name in _PAIRS[0] for token in (f"<{name}>", f"</{name}>")),
    "<sep>",
    *(token for name in _PAIRS[1] for token in (f"<{name}>", f"</{name}>")),
    "<and>",
)
"""Tokens after BART's, in the order of their ids: 1,024 [`desciption` sic]."""

ALIASES = (
    (r"^(vision_tower\.convs\.\d+)\.proj\.", r"\1.conv."),
    (r"\.(conv[12])\.fn\.dw\.", r".\1."),
    (r"\.(?:window_attn|channel_attn)\.norm\.", ".norm1."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.(window_attn|channel_attn)\.fn\.", r".\1."),
    (r"\.ffn\.fn\.net\.", ".ffn."),
    (r"^(image_proj_norm|visual_temporal_embed)\.", r"multi_modal_projector.\1."),
    (r"^image_pos_embed\.", "multi_modal_projector.image_position_embed."),
    (r"^language_model\.model\.", "language_model."),
)
"""Names of the layout -> transformers' without their prefix; no name of transformers' is changed."""

RULES = (Rule("image_projection", "image_projector/image_projection/kernel"),)
"""Tensors that are laid out otherwise: a product's [in, out], which transformers holds turned."""

_SAME = (
    "depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups", "window_size",
    "projection_dim", "drop_path_rate",
)  # fmt: skip
_LEFT = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


def has_layout(values: dict[str, Any]) -> bool:
    """Is a config.json of Microsoft's layout?

    >>> has_layout({"auto_map": {}}), has_layout({"vision_config": {"embed_dim": [128]}})
    (True, False)
    """
    text, vision = (
        part if isinstance(part := values.get(f"{name}_config"), dict) else {} for name in ("text", "vision")
    )
    return "auto_map" in values or text.get("model_type") == "florence2_language" or "dim_embed" in vision


def translate(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Translate a config.json into that of transformers' layout.

    Raises:
        UserError: something is missing, or is built otherwise than Florence-2.
    """
    text, vision = values["text_config"], values["vision_config"]
    places, times = _part(vision, "image_pos_embed", file), _part(vision, "visual_temporal_embedding", file)
    found = {
        "image_pos_embed.type": (places.get("type"), "learned_abs_2d"),
        "visual_temporal_embedding.type": (times.get("type"), "COSINE"),
        "image_feature_source": (vision.get("image_feature_source"), ["spatial_avg_pool", "temporal_avg_pool"]),
    }
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise UserError(f"{file}: vision_config.{name}={value!r} is not supported, only {wanted!r}")
    if not isinstance(vocabulary := text.get("vocab_size"), int) or vocabulary <= IMAGE_ID:
        raise UserError(f"{file}: text_config.vocab_size={vocabulary!r} has no token {IMAGE_ID}, {IMAGE}")
    return {
        "model_type": "florence2",
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "text_config": {key: value for key, value in text.items() if key not in _LEFT} | {"model_type": "bart"},
        "vision_config": {
            **{key: vision[key] for key in _SAME if key in vision},
            "model_type": "florence_vision",
            "embed_dim": vision.get("dim_embed"),
            "max_position_embeddings": places.get("max_pos_embeddings"),
            "max_temporal_embeddings": times.get("max_temporal_embeddings"),
        },
    }


def _part(vision: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    if not isinstance(part := vision.get(name), dict):
        raise UserError(f"{file}: vision_config.{name} is {part!r}, expected an object {{…}}")
    return part


def open_tokenizer(folder: Path) -> Any:
    """Open BART's tokenizer, and add the tokens that the folder's own code would."""
    from transformers import AddedToken, BartTokenizer

    tokenizer: Any = BartTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS], special_tokens=True)
    tokenizer.image_token, tokenizer.image_token_id = IMAGE, tokenizer.mask_token_id
    return tokenizer
