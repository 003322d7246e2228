"""Writes tests/models/golden/families.npz: `PYTHONPATH=src:tests:benchmarks python tests/models/make_family_golden.py`.

Needs the extra `parity`. Per case of the contract's, what transformers finds of the folder that `write_model` makes:
the logits of the batch's answers, projected onto a few directions. So the contract is held to it without PyTorch.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from models import causal_cases, causal_reference, clip_cases
from models.test_vlm_contract import GOLDEN, Case, project
from transformers import AutoModelForImageTextToText, CLIPModel


def find_clip_logits(folder, case):
    """Logits [B, 1, classes]."""
    prompts = [torch.tensor(ids).long()[None] for ids in case.processor.prompt_ids]
    pixels = torch.tensor(case.batch["pixel_values"]).permute(0, 3, 1, 2)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = [model(input_ids=ids, pixel_values=pixels).logits_per_image for ids in prompts]
    return torch.cat(found, 1).numpy()[:, None]


def find_logits(name, folder):
    """Logits [B, U, V] of the answers; zeros where there is none."""
    cases = causal_cases.CASES if name in causal_cases.CASES else clip_cases.CASES
    causal_cases.write_model(name, folder, cases=cases)
    case = Case(folder)
    if case.chooses:
        return find_clip_logits(folder, case)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return causal_reference.find_logits(model, case.batch, case.labels)


if __name__ == "__main__":
    found = {}
    for name in (*causal_cases.CASES, *clip_cases.CASES):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = project(find_logits(name, Path(folder)))
    np.savez_compressed(GOLDEN, **found)
