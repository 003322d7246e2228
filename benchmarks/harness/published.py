"""config.json of published models: the smallest of each family, and more of Qwen-VL's and CLIP's.

What a plan, a random checkpoint and a count of parameters need; nothing else of these models is here.
"""

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

SMOLVLM_256M: Config = {
    "model_type": "idefics3", "image_token_id": 49190, "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama", "head_dim": 64, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
        "rope_theta": 100000, "tie_word_embeddings": False, "vocab_size": 49280, "bos_token_id": 1,
        "eos_token_id": 49279, "pad_token_id": 2,
    },
    "vision_config": {
        "model_type": "idefics3_vision", "hidden_size": 768, "image_size": 512, "intermediate_size": 3072,
        "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 16,
    },
}  # fmt: skip

LLAVA_7B: Config = {
    "model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
    "tie_word_embeddings": False, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
ONEVISION_HALF_B: Config = {
    "model_type": "llava_onevision", "image_token_index": 151646, "projector_hidden_act": "gelu",
    "tie_word_embeddings": False, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "sliding_window": 131072, "use_sliding_window": False, "tie_word_embeddings": True, "vocab_size": 152000,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip

_SO400M: Config = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
GEMMA3_4B: Config = {
    "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
    "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {**_SO400M, "image_size": 896},
}  # fmt: skip
PALIGEMMA2_3B: Config = {
    "model_type": "paligemma", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 2304,
    "image_token_index": 257152, "projection_dim": 2304,
    "text_config": {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "vocab_size": 257216,
    },
    "vision_config": {**_SO400M, "projection_dim": 2304},
}  # fmt: skip

_QWEN3_TOWER: Config = {
    "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17], "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
}  # fmt: skip
_QWEN25_TOWER: Config = {
    "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "in_chans": 3,
    "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "tokens_per_second": 2,
}  # fmt: skip


def describe_qwen(
    kind: str, width: int, hidden: int, layers: int, heads: int, kv_heads: int, *, vocabulary: int = 151936,
    tied: bool = True,
) -> Config:  # fmt: skip
    """Describe a Qwen-VL: Qwen2.5-VL's config.json has the text model's fields beside its `vision_config`."""
    text: Config = {
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    whole: Config = {"model_type": kind, "image_token_id": 151655, "tie_word_embeddings": tied}
    if kind == "qwen2_5_vl":
        rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
        beside = {"rope_scaling": rope, "rope_theta": 1e6, "max_position_embeddings": 128000}
        windows = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 70}
        return whole | text | beside | windows | {"vision_config": _QWEN25_TOWER | {"out_hidden_size": width}}
    rope: Config = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text |= {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_scaling": rope, "rope_theta": 5e6}
    text |= {"max_position_embeddings": 262144, "attention_bias": False}
    return whole | {"text_config": text, "vision_config": _QWEN3_TOWER | {"out_hidden_size": width}}


_BASE: Config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE: Config = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP: dict[str, tuple[int, int, Config]] = {
    "ViT-B/32": (512, 8, {**_BASE, "patch_size": 32}),
    "ViT-B/16": (512, 8, {**_BASE, "patch_size": 16}),
    "ViT-L/14": (768, 12, {**_LARGE, "patch_size": 14}),
}
"""Name -> width of the text model and of the common space, its heads, and the tower."""


def describe_clip(name: str) -> Config:
    """Describe a CLIP of OpenAI's."""
    width, heads, vision = CLIP[name]
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return {
        "model_type": "clip", "projection_dim": width,
        "text_config": {"model_type": "clip_text_model", "num_hidden_layers": 12, "eos_token_id": 2, **text},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 224, **vision},
    }  # fmt: skip


INTERNVL3_1B: Config = {
    "model_type": "internvl", "downsample_ratio": 0.5, "image_token_id": 151667, "projector_hidden_act": "gelu",
    "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "vocab_size": 151674,
    },
    "vision_config": {
        "model_type": "internvl_vision", "attention_bias": True, "hidden_size": 1024, "image_size": [448, 448],
        "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": [14, 14],
    },
}  # fmt: skip

SMALLEST: dict[str, Config] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": SMOLVLM_256M,
    "Qwen/Qwen3-VL-2B-Instruct": describe_qwen("qwen3_vl", 2048, 6144, 28, 16, 8),
    "Qwen/Qwen2.5-VL-3B-Instruct": describe_qwen("qwen2_5_vl", 2048, 11008, 36, 16, 2),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": ONEVISION_HALF_B,
    "llava-hf/llava-1.5-7b-hf": LLAVA_7B,
    "google/paligemma2-3b-pt-224": PALIGEMMA2_3B,
    "google/gemma-3-4b-it": GEMMA3_4B,
    "OpenGVLab/InternVL3-1B-hf": INTERNVL3_1B,
    "openai/clip-vit-base-patch32": describe_clip("ViT-B/32"),
}
"""Hub id -> content of config.json; Florence-2-base's ships."""


def write_config(name: str, folder: Path) -> Path:
    """Write the config.json of a hub id into a folder that need not be there: all that a plan reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALLEST[name]), encoding="utf-8")
    return folder
