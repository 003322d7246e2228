"""transformers + PyTorch as the reference: random models and what they answer. Imported only where torch is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from models.cases import MAX_TOKENS, OPTIONS, PAD
from transformers import Florence2ForConditionalGeneration


def make_model(config: Any, seed: int = 0) -> Any:
    """A model whose outputs vary: weights large enough that greedy answers differ by picture, position and beam.

    Tied embeddings make a random model repeat the token it was given; positions, attention and the decoder's layers are
    therefore made stronger than the token embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.05 * noise)
            elif "embed" in name or "shared" in name:
                parameter.copy_(noise * (0.3 if "shared" in name else 1.0))
            else:
                sharp = ("q_proj", "k_proj", "decoder.layers")
                parameter.copy_(
                    noise * (2.0 if any(part in name for part in sharp) else 1.2) / parameter[0].numel() ** 0.5
                )
    return model


def to_torch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The batch as transformers takes it: channels first, 64-bit ids."""
    pixels = torch.tensor(batch["pixel_values"]).permute(0, 3, 1, 2)
    ids = {name: torch.tensor(array).long() for name, array in batch.items() if name != "pixel_values"}
    return {"pixel_values": pixels, **ids}


@torch.no_grad()
def answer(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Image features, logits and loss; for every generation option tokens, padded to MAX_TOKENS, and beams' scores."""
    inputs = to_torch(batch)
    output = model(**inputs)
    found = {
        "features": model.get_image_features(inputs["pixel_values"]).pooler_output.numpy(),
        "logits": output.logits.numpy(),
        "loss": output.loss.numpy(),
    }
    del inputs["labels"]
    for name, options in OPTIONS.items():
        answers = model.generate(
            **inputs, **options, max_new_tokens=MAX_TOKENS, do_sample=False, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        tokens = answers.sequences.numpy()[:, 1:]
        padded = np.full((len(tokens), MAX_TOKENS), PAD, np.int32)
        padded[:, : tokens.shape[1]] = tokens
        found[f"tokens/{name}"] = padded
        if options["num_beams"] > 1:
            found[f"scores/{name}"] = answers.sequences_scores.numpy()
    return found
