"""DPO as one writes it with transformers + PEFT, and the script that stores what it finds:
`PYTHONPATH=tests:benchmarks python tests/objectives/pytorch_dpo.py` writes golden_dpo.npz; needs the extra `parity`.

The conventions are TRL's (1.16): the reference is the model with its adapter switched off; `sigmoid` sums the
log-probabilities of a completion, `sigmoid_norm` and `ipo` take their mean over its tokens; the loss is the mean over
the pairs. Label smoothing is that of cDPO. Nothing of fedvlm_jax is in it: one call of the model for each kind of
answer, autograd.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from federation.pytorch_round import TARGETS, find_places, find_sites
from federation.round_case import ALPHA, BASE, RANK, draw_start
from objectives.dpo_case import CASES, FILE, make_batch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pytorch_peft import from_arrays, load_model, to_arrays
from torch.nn.functional import log_softmax, logsigmoid


def score(model: torch.nn.Module, batch: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability and number of tokens of every answer of one kind."""
    labels = batch[name]
    prompt = {key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    found = log_softmax(model(**prompt, labels=labels).logits, dim=-1)
    counts = labels != -100
    chosen = found.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * counts).sum(-1), counts.sum(-1)


def compute_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], case: str) -> torch.Tensor:
    """The case's loss, with a graph to its adapter."""
    _, variant, beta, smoothing, weight = CASES[case]
    ratios, likelihood = [], torch.zeros(())
    for name in ("labels", "rejected_labels"):
        policy, tokens = score(model, batch, name)
        with torch.no_grad(), model.disable_adapter():
            reference, _ = score(model, batch, name)
        ratio = policy - reference
        ratios.append(ratio if variant == "sigmoid" else ratio / tokens)
        if name == "labels":
            likelihood = -policy.sum() / tokens.sum()
    delta = ratios[0] - ratios[1]
    if variant == "ipo":
        losses = (delta - 1 / (2 * beta)) ** 2
    else:
        losses = -logsigmoid(beta * delta) * (1 - smoothing) - logsigmoid(-beta * delta) * smoothing
    return losses.mean() + weight * likelihood


def answer(folder: Path) -> dict[str, np.ndarray]:
    """`case/loss`, gradients `case/path`, and the base's log-probabilities, `reference/labels` and the like."""
    model = load_model(folder, RANK, ALPHA, TARGETS)
    fresh = get_peft_model_state_dict(model)
    places = find_places(fresh)
    set_peft_model_state_dict(model, from_arrays(places, draw_start("trained", find_sites(fresh))))
    batch = {name: torch.tensor(array) for name, array in make_batch().items()}
    batch = {name: array if name == "pixel_values" else array.long() for name, array in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
    found = {}
    with torch.no_grad(), model.disable_adapter():
        for name in ("labels", "rejected_labels"):
            found[f"reference/{name}"] = score(model, batch, name)[0].numpy()
    for case in CASES:
        model.zero_grad()
        loss = compute_loss(model, batch, case)
        loss.backward()
        found[f"{case}/loss"] = loss.detach().numpy()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        named = {name.replace(".default.", "."): gradient for name, gradient in gradients.items()}
        found |= {f"{case}/{path}": array for path, array in to_arrays(places, named).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **answer(BASE))
