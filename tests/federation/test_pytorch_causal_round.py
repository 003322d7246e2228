"""One round of two clients × three SGD steps on tiny decoder-only models, live against transformers + PEFT."""

import importlib.util

import numpy as np
import pytest
from federation.round_case import ALPHA, RANK, STEPS
from federation.test_pytorch_round import norm, run_ours
from harness.world import name_modules
from models import causal_cases

from fedvlm_jax.models import load_weights, open_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "peft")),
        reason="needs the extra `parity`: pip install -e '.[parity]'",
    ),
]
QUESTIONS = ["what is this?", "a", "is it a red car, or two?", "yes?", "what car is it?"]
ANSWERS = ["a car", "no", "yes it is one", "two", "a long answer of many words"]
RATES = (0.3, 0.02)


def make_clients(processor):
    """Five examples and two, padded to the longest of all."""
    from PIL import Image

    rng = np.random.default_rng(6)
    ids, mask = processor.prompts(QUESTIONS)
    labels = processor.answers(ANSWERS, 8)
    images = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(7)]
    pixels = processor.pixels(images)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    first = {"pixel_values": pixels[:5], **rows}
    return [first, {"pixel_values": pixels[5:], **{name: array[[3, 1]] for name, array in rows.items()}}]


def run_theirs(folder, clients, modules, start):
    """Mean of the clients' factors after the round, by path, weighted by their examples."""
    import torch
    from models import causal_reference
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from pytorch_peft import name_places
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name for names in modules.values() for name in names])
    model = get_peft_model(base, config).eval()
    keys = name_places(modules)
    assert get_peft_model_state_dict(model).keys() == keys.keys()
    states, counts = [], []
    for client, steps in zip(clients, STEPS, strict=True):
        begin = {key: torch.tensor(start[path][layer].T.copy()) for key, (path, layer) in keys.items()}
        set_peft_model_state_dict(model, begin)
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for n, p in factors.items() if f"lora_{side}" in n], "lr": rate}
            for side, rate in zip("AB", RATES, strict=True)
        ]
        rule = torch.optim.SGD(groups)
        for step in steps:
            rule.zero_grad()
            sequences = []
            for row in step:
                prompt = client["input_ids"][row][client["attention_mask"][row] != 0]
                answer = client["labels"][row][client["labels"][row] != -100]
                sequences.append(
                    (np.concatenate([prompt, answer]), np.concatenate([np.full_like(prompt, -100), answer]))
                )
            longest = max(len(ids) for ids, _ in sequences)
            ids = torch.tensor(np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in sequences])).long()
            wanted = [np.pad(labels, (0, longest - len(labels)), constant_values=-100) for _, labels in sequences]
            mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s, _ in sequences])
            seen = [causal_reference.to_inputs(base, client, row)[0] for row in step]
            inputs = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
            prompts = torch.tensor([[client["attention_mask"][row].sum()] for row in step])
            inputs |= causal_reference.find_kinds(base, ids, prompts)
            found = model(input_ids=ids, attention_mask=mask, labels=torch.tensor(np.stack(wanted)).long(), **inputs)
            found.loss.backward()
            rule.step()
        states.append({key: value.clone() for key, value in get_peft_model_state_dict(model).items()})
        counts.append(len(client["labels"]))
    mean = {}
    for key, (path, layer) in keys.items():
        value = sum(n / sum(counts) * state[key] for n, state in zip(counts, states, strict=True))
        mean.setdefault(path, {})[layer] = value.numpy().T
    return {path: np.stack([layers[n] for n in sorted(layers)]) for path, layers in mean.items()}


@pytest.mark.parametrize("name", ["smolvlm", "paligemma2", "gemma3", "qwen3-vl"])
def test_a_round_is_pytorch_s(name, tmp_path):
    from models import causal_reference

    causal_cases.CASES[name](tmp_path)
    causal_reference.make_model(tmp_path, 4)
    vlm, processor = open_model(tmp_path)
    clients, modules = make_clients(processor), name_modules(vlm)
    params = load_weights(vlm, tmp_path)
    start, ours, _ = run_ours(vlm, params, clients, vlm.targets, "fedavg-lora", None, "trained", RATES)
    theirs = run_theirs(tmp_path, clients, modules, start)
    assert ours["server"].keys() == theirs.keys()
    for factor in "ab":
        paths = [path for path in theirs if path.endswith(f"/{factor}")]
        moved = norm(theirs[path] - start[path] for path in paths)
        error = norm(ours["server"][path] - theirs[path] for path in paths)
        print(f"{name} {factor}: moved {moved:.3g}, error {error / moved:.1e} of that")  # noqa: T201
        assert moved > 0.005 * norm(start[path] for path in paths), "the round did too little to compare"
        assert error <= 1e-3 * moved
