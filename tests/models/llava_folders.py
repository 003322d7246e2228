"""config.json of LLaVA's and Gemma's smallest published models, and the names that tensors have in folders."""

import re

from safetensors.numpy import save_file

LLAVA_7B = {
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
ONEVISION_HALF_B = {
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

_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
    "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {**_SO400M, "image_size": 896},
}  # fmt: skip
PALIGEMMA2_3B = {
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

SPELLINGS = {
    "transformers 5": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.", ""),
        (r"^lm_head", "language_model.lm_head"),
    ),
    "the hub": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
        (r"^lm_head", "language_model.lm_head"),
    ),
    "transformers 4.52": ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),),
}


def spell(tensors, spelling):
    """The same tensors under other names."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in SPELLINGS[spelling]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def save(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
