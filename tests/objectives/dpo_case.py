"""The pairs and the losses that are worked out twice, by our objectives and by PyTorch: base, start, batch, cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from federation.round_case import IMAGE_TOKEN, IMAGE_TOKENS, PAD, PROMPT, SIZE

FILE = Path(__file__).with_name("golden_dpo.npz")

# name -> objective, variant, beta, label smoothing, weight of SFT
CASES = {
    "sigmoid": ("dpo", "sigmoid", 0.1, 0.0, 0.0),
    "smoothed": ("dpo", "sigmoid", 0.3, 0.2, 0.0),
    "length-normalised": ("dpo", "length-normalised", 2.0, 0.0, 0.0),
    "ipo": ("dpo", "ipo", 0.4, 0.0, 0.0),
    "with_sft": ("sft+dpo", "sigmoid", 0.1, 0.0, 0.7),
}

# Tokens of the chosen and of the rejected answers: shorter, longer, and a single one.
LENGTHS = ((4, 9), (7, 2), (5, 5), (3, 1))


def make_batch() -> dict[str, np.ndarray]:
    """Four prompts with two answers each, padded on the right."""
    random = np.random.default_rng(8)
    count = len(LENGTHS)
    ids = random.integers(3, IMAGE_TOKEN, (count, IMAGE_TOKENS + PROMPT)).astype(np.int32)
    ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN
    mask = np.ones_like(ids)
    ids[0, -2:], mask[0, -2:] = PAD, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    for side, name in enumerate(("labels", "rejected_labels")):
        longest = max(lengths[side] for lengths in LENGTHS)
        batch[name] = random.integers(3, IMAGE_TOKEN, (count, longest)).astype(np.int32)
        for row, lengths in enumerate(LENGTHS):
            batch[name][row, lengths[side] :] = -100
    return batch | {"pixel_values": random.standard_normal((count, *SIZE, 3)).astype(np.float32)}
