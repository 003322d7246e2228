"""The small federation that is run twice, by our engine and by a PyTorch loop: base, start, examples, cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np

BASE = Path(__file__).parents[1] / "models" / "golden" / "windows"  # two layers a side, saved by transformers
FILE = Path(__file__).with_name("golden_round.npz")
TARGETS = r"language_model/(encoder|decoder)/layers/.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
RANK, ALPHA = 2, 3.0
IMAGE_TOKEN, PAD = 98, 1
SIZE, IMAGE_TOKENS, PROMPT, ANSWER = (16, 24), 7, 5, 4

# name -> method, clipping, how the adapter starts, rates for A and B. The start and the rates are such that PyTorch in
# float32 is within 4e-5 of PyTorch in float64 (relative to the movement): with a B of 0.1 and no clipping it is 7e-3
# away from itself, and would tell nothing. Where B starts at zero, A moves little at first and has a larger rate.
CASES = {
    "fedavg_fresh": ("fedavg-lora", None, "fresh", (1.5, 0.04)),
    "fedavg_clipped": ("fedavg-lora", 0.5, "trained", (3.0, 0.5)),
    "plora": ("plora", None, "trained", (0.3, 0.05)),
}
GOLDEN_CASES = ("fedavg_clipped", "plora")

# Rows of each local step; the clients have five examples and two.
STEPS = (((0, 1, 2), (3, 4), (1, 0, 4)), ((0, 1), (1,), (1, 0)))
EXAMPLES = (5, 2)


def draw_start(kind: str, sites: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The adapter that both clients begin with, by path: B is zero where it is fresh.

    Args:
        kind: "fresh" or "trained".
        sites: path -> layers where they are stacked, d_in, d_out.
    """
    random = np.random.default_rng(5)
    start = {}
    for path, (*layers, d_in, d_out) in sorted(sites.items()):
        start[f"{path}/a"] = random.normal(0, 1 / RANK, (*layers, d_in, RANK)).astype(np.float32)
        b = random.normal(0, 0.03, (*layers, RANK, d_out)).astype(np.float32)
        start[f"{path}/b"] = b if kind == "trained" else np.zeros_like(b)
    return start


def make_clients() -> list[dict[str, np.ndarray]]:
    """Each client's examples: prompts of several lengths, answers with ignored positions, pictures."""
    random = np.random.default_rng(6)
    clients = []
    for number, count in enumerate(EXAMPLES):
        ids = random.integers(3, IMAGE_TOKEN, (count, IMAGE_TOKENS + PROMPT)).astype(np.int32)
        ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN
        mask = np.ones_like(ids)
        labels = random.integers(3, IMAGE_TOKEN, (count, ANSWER)).astype(np.int32)
        ids[0, -2:], mask[0, -2:], labels[1, -1 - number :] = PAD, 0, -100
        pixels = random.standard_normal((count, *SIZE, 3)).astype(np.float32)
        clients.append({"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels})
    return clients
