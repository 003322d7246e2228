"""Tiny models of the decoder-only families: folders as transformers has them, without weights."""

import json
from pathlib import Path

SENTENCES = [
    "what is this? is it a red car, or two?",
    "yes it is one. a car, a long answer of many words",
    "User: Assistant:",
]
LLAMA = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 160,
    "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 3, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
SIGLIP = {
    "hidden_size": 18, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def write_json(file: Path, values) -> None:
    file.write_text(json.dumps(values))


def write_tokenizer(folder: Path, special: list[str], bos: str, eos: str, pad: str) -> dict[str, int]:
    """A byte-level tokenizer whose first ids are the special tokens; returns its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=312, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)
    return fast.get_vocab()


def write_smolvlm(folder: Path, *, kind: str = "smolvlm", tied: bool = False, **text) -> None:
    """Configuration, tokenizer and image processor of a tiny SmolVLM or Idefics3."""
    special = [
        "<unk>",
        "<|im_start|>",
        "<pad>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
    ]
    ids = write_tokenizer(folder, special, "<|im_start|>", "<end_of_utterance>", "<pad>")
    write_json(folder / "config.json", {
        "model_type": kind, "scale_factor": 2, "image_token_id": ids["<image>"], "tie_word_embeddings": tied,
        "text_config": {**LLAMA, "tie_word_embeddings": tied, **text},
        "vision_config": {"model_type": f"{kind}_vision", **SIGLIP},
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 2})
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": f"{name}ImageProcessor", "do_image_splitting": True,
        "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_pad": True, "do_convert_rgb": True, "resample": 1, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })  # fmt: skip


CASES = {
    "smolvlm": lambda folder: write_smolvlm(folder),
    "smolvlm-tied": lambda folder: write_smolvlm(folder, tied=True, num_hidden_layers=4, num_key_value_heads=1),
    "idefics3": lambda folder: write_smolvlm(folder, kind="idefics3", num_key_value_heads=4),
}
"""Name -> what writes a folder of it."""


def write_model(name: str, folder: Path, seed: int = 5) -> None:
    """A folder of a case with random weights, strong enough that answers depend on everything."""
    import jax

    from fedvlm_jax.models import read_vlm, save_checkpoint

    CASES[name](folder)
    vlm = read_vlm(folder)
    paths, structure = jax.tree.flatten_with_path(jax.jit(vlm.init)(jax.random.key(seed)))
    drawn = []
    for (path, leaf), key in zip(paths, jax.random.split(jax.random.key(seed + 1), len(paths)), strict=True):
        noise = jax.random.normal(key, leaf.shape)
        if path[-1].key == "kernel":
            drawn.append(noise / (leaf.size / leaf.shape[-1] / (leaf.shape[0] if leaf.ndim == 3 else 1)) ** 0.5)
        else:
            drawn.append(leaf + 0.2 * noise)
    save_checkpoint(vlm, jax.tree.unflatten(structure, drawn), folder)
