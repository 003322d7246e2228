"""transformers + PyTorch as the reference for decoder-only models. Imported only where torch is."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig


def make_model(folder, seed=0):
    """A random model of a folder's configuration, written into it; its outputs vary, its logits lie in about ±10."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "embed" in name:
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return model


def to_pixels(batch, row):
    pixels = torch.tensor(batch["pixel_values"][row : row + 1]).permute(0, 3, 1, 2)
    return pixels[:, None]  # SmolVLM has an axis of tiles


@torch.no_grad()
def find_logits(model, batch, labels, pixels=to_pixels, dtype=torch.float32):
    """Logits [B, U, V] that predict the labels, every row alone and unpadded; zeros where labels are ignored."""
    rows = []
    for row, (ids, mask, label) in enumerate(zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)):
        prompt, answer = ids[mask != 0], label[label != -100]
        whole = torch.tensor(np.concatenate([prompt, answer])[None]).long()
        found = model(input_ids=whole, pixel_values=pixels(batch, row).to(dtype), attention_mask=torch.ones_like(whole))
        said = found.logits[0, len(prompt) - 1 : len(whole[0]) - 1].float().numpy()
        rows.append(np.pad(said, ((0, len(label) - len(said)), (0, 0))))
    return np.stack(rows)


@torch.no_grad()
def generate(model, batch, length, pixels=to_pixels, **options):
    """Tokens [B, length] after each prompt alone, padded with the pad token."""
    rows = []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        prompt = torch.tensor(ids[mask != 0][None]).long()
        found = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=pixels(batch, row),
            max_new_tokens=length, do_sample=False, **options,
        )  # fmt: skip
        said = found[0, prompt.shape[1] :].numpy()
        rows.append(np.pad(said, (0, length - len(said)), constant_values=model.generation_config.pad_token_id))
    return np.stack(rows)
