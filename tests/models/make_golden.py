"""Writes the golden files in tests/models/golden: `PYTHONPATH=tests python tests/models/make_golden.py`.

Needs the extra `parity`. Per case of `cases.py`, a folder as transformers saves it (random weights) and answers.npz
with image features, logits, loss, generated tokens and beams' scores. Ordinary tests then check this package without
PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from models import reference
from models.cases import CASES, make_batch, make_config

from fedvlm_jax.models.florence2.model import image_tokens

GOLDEN = Path(__file__).parent / "golden"

if __name__ == "__main__":
    for seed, (name, (_, _, size)) in enumerate(CASES.items()):
        config = make_config(name)
        model = reference.make_model(config, seed)
        model.save_pretrained(GOLDEN / name)
        found = reference.answer(model, make_batch(name, image_tokens(config, *size)))
        np.savez_compressed(GOLDEN / name / "answers.npz", **found)
