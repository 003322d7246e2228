"""Writes golden/: `PYTHONPATH=tests python tests/peft_files/make_peft_golden.py`. Needs the extra `parity`.

Folders that PEFT itself saved of random adapters on the model in tests/models/golden/single, and the logits that it
computes with them, as `logits.npy` beside. Ordinary tests read them without PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from models import reference
from models.cases import CASES, make_batch
from peft import LoraConfig, get_peft_model
from transformers import Florence2ForConditionalGeneration

from fedvlm_jax.models import read_vlm

GOLDEN = Path(__file__).parent / "golden"
BASE = Path(__file__).parents[1] / "models" / "golden" / "single"
CONFIGS = {
    # Suffixes, patterns, two ranks, rsLoRA, every kind of layer.
    "layers": LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, lora_dropout=0.1, rank_pattern={"decoder.layers.0.fc1": 3},
        alpha_pattern={"encoder_attn.q_proj": 5, r"^.*\.row_embeddings$": 7},
        target_modules=["q_proj", "fc1", "qkv", "conv", "image_projection", "row_embeddings"],
    ),
    "tied": LoraConfig(
        r=2, lora_alpha=4, target_modules=["shared", "decoder.embed_tokens", "lm_head", "out_proj"]
    ),
}  # fmt: skip


def draw(model: torch.nn.Module, seed: int) -> None:
    """Random factors; those of modules that share a table are one pair."""
    generator = torch.Generator().manual_seed(seed)
    tied: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            side = "ab"[("_B" in name) != ("lm_head" in name)]
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            if any(part in name for part in ("lm_head", "shared", "embed_tokens")):
                noise = tied.setdefault(side, noise if "lm_head" not in name else noise.T)
                noise = noise.T if "lm_head" in name else noise
            parameter.copy_(noise)


def answer(model: torch.nn.Module) -> np.ndarray:
    tokens = read_vlm(BASE).image_tokens(*CASES[BASE.name][2])
    with torch.no_grad():
        return model(**reference.to_torch(make_batch(BASE.name, tokens))).logits.numpy()


if __name__ == "__main__":
    for seed, (name, config) in enumerate(CONFIGS.items()):
        base = Florence2ForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
        model = get_peft_model(base, config).eval()
        draw(model, seed)
        model.peft_config["default"].base_model_name_or_path = BASE.name
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "README.md").unlink()
        np.save(GOLDEN / name / "logits.npy", answer(model))
