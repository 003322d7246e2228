"""Tiny CLIP models: folders as transformers has them."""

from pathlib import Path

from harness.published import describe_clip
from models.causal_cases import write_json

MERGES = [("c", "a"), ("d", "o"), ("r", "e"), ("o", "f</w>")]
LAYERS = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSES = ["a red cat", "car", "dog", "no", "yes it is one"]


def write_clip_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer as CLIP's: bytes, words that end in </w>, and the end of texts as the largest id."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merged = ["".join(pair) for pair in MERGES]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=MERGES)
    tokenizer.save_pretrained(folder)
    return tokenizer.get_vocab()


def write_clip(folder: Path, *, legacy: bool = False, act: str = "quick_gelu", **text) -> None:
    """Configuration, tokenizer and image processor; `legacy` files are as those of 2022, which say that EOS is 2."""
    ids = write_clip_tokenizer(folder)
    eos = ids["<|endoftext|>"]
    write_json(folder / "config.json", {
        "model_type": "clip", "projection_dim": 12, "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model", **LAYERS, "vocab_size": eos + 1, "max_position_embeddings": 40,
            "hidden_act": act, "eos_token_id": 2 if legacy else eos, "bos_token_id": eos - 1, "pad_token_id": eos,
            **text,
        },
        "vision_config": {
            "model_type": "clip_vision_model", **LAYERS, "hidden_size": 18, "num_attention_heads": 3,
            "image_size": 32, "patch_size": 8, "hidden_act": act,
        },
    })  # fmt: skip
    size = {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"}
    if not legacy:
        size = {
            "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_rescale": True,
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "rescale_factor": 1 / 255,
        }  # fmt: skip
    write_json(folder / "preprocessor_config.json", {
        **size, "do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    })  # fmt: skip


CASES = {
    "clip": lambda folder: write_clip(folder),
    "clip-legacy": lambda folder: write_clip(folder, legacy=True, act="gelu", num_hidden_layers=4),
}
"""Name -> what writes a folder of it."""


def open_module(vlm, dtype):
    """The module of a model, for what its record does not give out: embeddings of texts, and of any tokens."""
    from fedvlm_jax.models.clip.config import read_text, read_tower
    from fedvlm_jax.models.clip.model import Clip
    from fedvlm_jax.models.layers import USUAL

    text = vlm.config.text_config
    return Clip(
        vision=read_tower(vlm.config), text=read_text(vlm.config), width=vlm.image_width, vocabulary=text.vocab_size,
        positions=text.max_position_embeddings, ends=text.eos_token_id, scale=0.0, dtype=dtype, stacking=USUAL,
    )  # fmt: skip


def embed_texts(vlm, params, ids):
    """The embeddings of tokens [C, T], of length 1."""
    import jax.numpy as jnp

    found = open_module(vlm, jnp.float32).apply({"params": params}, jnp.asarray(ids), method="text_features")
    return found / jnp.linalg.norm(found, axis=-1, keepdims=True)


PARAMETERS = {"ViT-B/32": 151_277_313, "ViT-B/16": 149_620_737, "ViT-L/14": 427_616_513}
"""Name of a published model -> how many there are."""


def write_published(name: str, folder: Path) -> None:
    """The configuration of a published shape and the size of its pictures: what `fedvlm explain` reads."""
    write_json(folder / "config.json", describe_clip(name))
    write_json(folder / "preprocessor_config.json", {"size": 224, "crop_size": 224, "do_center_crop": True})
