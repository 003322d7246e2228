"""The tiny random models that the golden files and the live comparison share: shapes, inputs, generation options."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.objectives.log_probs import token_losses

IMAGE_TOKEN, PAD, VOCABULARY = 98, 1, 99

_VISION: dict[str, Any] = {
    "depths": (1, 2),
    "patch_size": (7, 3),
    "patch_stride": (4, 2),
    "patch_padding": (3, 1),
    "patch_prenorm": (False, True),
    "embed_dim": (8, 16),
    "num_heads": (2, 4),
    "num_groups": (2, 4),
    "window_size": 3,
    "projection_dim": 24,
    "max_position_embeddings": 12,
    "max_temporal_embeddings": 5,
}
_TEXT: dict[str, Any] = {
    "model_type": "bart",
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 80,
}

# name -> changes to vision, changes to text, image height and width
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "windows": ({}, {}, (40, 52)),  # several windows, none of which divides the map
    "odd": (
        {"patch_prenorm": (True, False), "qkv_bias": False, "activation_function": "quick_gelu"},
        {"scale_embedding": True, "activation_function": "relu"},
        (37, 61),
    ),
    "single": (  # one stage, one layer, a window larger than the map
        {
            **{name: values[:1] for name, values in _VISION.items() if isinstance(values, tuple)},
            "depths": (1,),
            "window_size": 9,
        },
        {"encoder_layers": 1, "decoder_layers": 1},
        (16, 16),
    ),
}

# name -> generation options, as transformers' generate takes them; None is said in the generation configuration
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "greedy_forced": {"num_beams": 1, "forced_bos_token_id": 0, "no_repeat_ngram_size": 2},
    "greedy_unigrams": {"num_beams": 1, "no_repeat_ngram_size": 1, "min_new_tokens": 3},
    "greedy_ends": {"num_beams": 1, "eos_token_id": [2, *range(3, 60, 3)]},
    "beams_ends": {"num_beams": 3, "early_stopping": True, "eos_token_id": [2, *range(3, 60, 6)]},
    "beams": {"num_beams": 3, "early_stopping": False},
    "beams_early": {
        "num_beams": 3,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
    },
    "beams_never": {
        "num_beams": 4,
        "eos_token_id": [2, 4, 8, 16, 32, 64],
        "early_stopping": "never",
        "length_penalty": 2.0,
        "no_repeat_ngram_size": 2,
    },
    "beams_short": {"num_beams": 2, "eos_token_id": [2, 5, 25, 50, 75], "length_penalty": -1.0, "min_length": 4},
}
MAX_TOKENS = 9


def make_config(name: str) -> Any:
    """transformers' Florence2Config of a case; no EOS is forced, so that options decide."""
    from transformers import Florence2Config

    vision, text, _ = CASES[name]
    text = {**_TEXT, **text, "forced_eos_token_id": None}
    return Florence2Config(vision_config={**_VISION, **vision}, text_config=text, image_token_id=IMAGE_TOKEN)


def make_batch(name: str, image_tokens: int) -> dict[str, np.ndarray]:
    """Three examples: padded prompts, image tokens not always first, labels with ignored positions."""
    height, width = CASES[name][2]
    random = np.random.default_rng(len(name))
    ids = random.integers(3, IMAGE_TOKEN, (3, image_tokens + 7)).astype(np.int32)
    mask = np.ones_like(ids)
    for row, start in enumerate((0, 1, 0)):
        ids[row, start : start + image_tokens] = IMAGE_TOKEN
    ids[0, -3:], mask[0, -3:] = PAD, 0
    labels = random.integers(3, IMAGE_TOKEN, (3, 6)).astype(np.int32)
    labels[1, -2:] = -100
    return {
        "pixel_values": random.standard_normal((3, height, width, 3)).astype(np.float32),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }


def to_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The same options as `Vlm.generate` takes them."""
    names = {"eos_token_id": "eos_token_ids", "forced_eos_token_id": "forced_eos_token_ids"}
    return {
        names.get(name, name): tuple(np.atleast_1d(value).tolist()) if name in names else value
        for name, value in options.items()
    }


def to_labels(ids: np.ndarray, ends: Any) -> np.ndarray:
    """Generated tokens as labels: what comes after the first of those that end an answer is ignored."""
    ended = np.isin(ids, ends)
    return np.where(np.cumsum(ended, 1) - ended == 0, ids, IGNORED)


def mean_log_probs(logits: Any, labels: np.ndarray) -> np.ndarray:
    """The mean log-probability of each answer's tokens [B]: a beam's score where the length penalty is 1."""
    losses, _, counts = token_losses(logits, labels)
    return np.asarray(-losses.sum(1) / counts.sum(1))
