"""Writes tests/models/golden/families.npz: `PYTHONPATH=src:tests:benchmarks python tests/models/make_family_golden.py`.

Needs the extra `parity`. Per case of the contract's, what transformers finds of the folder of `write_sharp_model`:
features of the first picture, logits that predict the answers' tokens, their loss, tokens of every search, and of beams
the scores. So every family is held to it without PyTorch.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from models import causal_cases, causal_reference
from models.test_family_golden import CASES, GOLDEN, LENGTH, open_case
from transformers import AutoModelForImageTextToText, CLIPModel


def ask_clip(folder, case):
    """Embeddings of the pictures and of the classes' prompts, logits [B, classes], loss of the answers, choices."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.tensor(case.batch["pixel_values"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(case.processor.prompt_ids).long(), pixel_values=pixels)
    logits = found.logits_per_image
    return {
        "images": found.image_embeds,
        "texts": found.text_embeds,
        "logits": logits,
        "loss": torch.nn.functional.cross_entropy(logits, torch.tensor(case.labels[:, 0]).long()),
        "greedy": logits.argmax(-1),
    }


def ask(folder, case):
    """Answers of a decoder-only model; refuses those that its rounding decides."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = {
        "features": causal_reference.find_features(model, case.batch)[0],
        "logits": causal_reference.find_logits(model, case.batch, case.labels)[case.labels != -100],
        "loss": causal_reference.find_loss(model, case.batch, case.labels),
    }
    for name, options in causal_cases.SEARCHES.items():
        found[name], scores = causal_reference.search(model, case.batch, LENGTH, **options)
        if scores is not None:
            found[f"{name}_scores"] = scores
    model = model.double()
    for name, options in causal_cases.SEARCHES.items():
        exact = causal_reference.generate(model, case.batch, LENGTH, **options)
        np.testing.assert_array_equal(found[name], exact, err_msg=f"{folder.name}: float64 finds others")
    return found


def main():
    found = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / name
            folder.mkdir()
            case = open_case(name, folder)
            answers = ask_clip(folder, case) if case.chooses else ask(folder, case)
        for kind, array in answers.items():
            array = np.asarray(array)
            found[f"{name}/{kind}"] = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
