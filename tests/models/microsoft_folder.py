"""A folder of a tiny Florence-2 as Microsoft published it, made of one as transformers has it."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

VOCABULARY = 51289
NAMES = (  # transformers' -> Microsoft's, as transformers' own script of conversion has them turned
    (r"^model\.", ""),
    (r"(convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.(conv[12])\.", r".\1.fn.dw."),
    (r"(spatial_block)\.norm1\.", r"\1.window_attn.norm."),
    (r"(channel_block)\.norm1\.", r"\1.channel_attn.norm."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"\.(window_attn|channel_attn)\.(qkv|proj)\.", r".\1.fn.\2."),
    (r"\.ffn\.(fc[12])\.", r".ffn.fn.net.\1."),
    (r"^multi_modal_projector\.image_projection\.weight$", "image_projection"),
    (r"^multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
    (r"^multi_modal_projector\.", ""),
    (r"^language_model\.", "language_model.model."),
)
CONFIG = {
    "model_type": "florence2", "architectures": ["Florence2ForConditionalGeneration"], "projection_dim": 24,
    "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"}, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 1, "vocab_size": VOCABULARY, "torch_dtype": "float16", "is_encoder_decoder": True,
}  # fmt: skip
TEXT = {  # beside its sizes, as Florence-2-base has it
    "model_type": "florence2_language", "vocab_size": VOCABULARY, "activation_dropout": 0.1, "torch_dtype": "float16",
    "activation_function": "gelu", "add_bias_logits": False, "add_final_layer_norm": False, "attention_dropout": 0.1,
    "bos_token_id": 0, "classif_dropout": 0.1, "classifier_dropout": 0.0, "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2, "dropout": 0.1, "early_stopping": True, "encoder_layerdrop": 0.0, "eos_token_id": 2,
    "forced_bos_token_id": 0, "forced_eos_token_id": 2, "gradient_checkpointing": False, "init_std": 0.02,
    "is_encoder_decoder": True, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "no_repeat_ngram_size": 3,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "normalize_before": False, "num_beams": 3,
    "pad_token_id": 1, "scale_embedding": False,
}  # fmt: skip
SIZES = (
    "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
    "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings",
)  # fmt: skip
STAGES = (
    "depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups", "window_size",
    "projection_dim",
)  # fmt: skip


def write_config(source: Path, folder: Path) -> None:
    """Write config.json of a model whose configuration transformers has in `source`."""
    theirs = json.loads((source / "config.json").read_text())
    text, vision = theirs["text_config"], theirs["vision_config"]
    ours = {
        "model_type": "davit", "dim_embed": vision["embed_dim"], "drop_path_rate": 0.1, "enable_checkpoint": False,
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": vision["max_position_embeddings"]},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": vision["max_temporal_embeddings"]},
    }  # fmt: skip
    parts = {
        "text_config": TEXT | {name: text[name] for name in SIZES},
        "vision_config": ours | {name: vision[name] for name in STAGES},
    }
    (folder / "config.json").write_text(json.dumps(CONFIG | parts))


def make_tensors(source: Path) -> dict[str, np.ndarray]:
    """The weights in `source` under Microsoft's names, with every copy of the token table, which is of BART's size."""
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.T if name == "image_projection" else tensor
    table = renamed["language_model.model.shared.weight"]
    rows = np.random.default_rng(0).standard_normal((VOCABULARY - len(table), table.shape[1])).astype(table.dtype)
    table = np.concatenate([table, rows])
    copies = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    renamed |= {f"language_model.{name}.weight": table for name in copies}
    return renamed | {"language_model.final_logits_bias": np.zeros((1, VOCABULARY), np.float32)}
