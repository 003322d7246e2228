"""One round of two clients × three SGD steps on a tiny CLIP, live against transformers + PEFT: both towers adapted."""

import importlib.util

import numpy as np
import pytest
from federation.round_case import ALPHA, EXAMPLES, RANK, STEPS
from federation.test_pytorch_causal_round import RATES
from federation.test_pytorch_round import norm, run_ours
from models import clip_cases

from fedvlm_jax import lora
from fedvlm_jax.models import load_weights, open_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "peft")),
        reason="needs the extra `parity`: pip install -e '.[parity]'",
    ),
]
TARGETS = r"(vision_tower|text_model)/layers/.*((q|k|v|out)_proj|fc1|fc2)|(visual|text)_projection"


def make_clients(processor, classes):
    rng = np.random.default_rng(6)
    clients = []
    for count in EXAMPLES:
        ids, mask = processor.prompts(["which?"] * count)
        pixels = rng.normal(0, 1 + np.arange(count)[:, None, None, None], (count, 32, 32, 3)).astype(np.float32)
        labels = processor.answers(rng.choice(classes, count).tolist(), 4)
        clients.append({"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels})
    return clients


def name_modules(vlm):
    """Path of a site -> (the name that its module has in transformers, layer or None) of all its layers."""
    found = {}
    for site in lora.select(vlm.sites, TARGETS):
        names = vlm.table.find_names(site.weight, site.stack[0] if site.stack else 1)
        found[site.path] = [(name.removesuffix(".weight"), slot.layer) for name, slot in names]
    return found


def run_theirs(folder, clients, modules, start, class_ids):
    """Mean of the clients' factors after the round, by path, weighted by their examples."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import CLIPModel

    base = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    wanted = [name for names in modules.values() for name, _ in names]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=wanted)).eval()
    keys = {
        f"base_model.model.{name}.lora_{side.upper()}.weight": (f"{path}/{side}", layer)
        for path, names in modules.items() for name, layer in names for side in "ab"
    }  # fmt: skip
    assert get_peft_model_state_dict(model).keys() == keys.keys()
    texts, states = torch.tensor(class_ids).long(), []
    for client, steps in zip(clients, STEPS, strict=True):
        begin = {
            key: torch.tensor((start[path] if layer is None else start[path][layer]).T.copy())
            for key, (path, layer) in keys.items()
        }
        set_peft_model_state_dict(model, begin)
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for n, p in factors.items() if f"lora_{side}" in n], "lr": rate}
            for side, rate in zip("AB", RATES, strict=True)
        ]
        rule = torch.optim.SGD(groups)
        for step in steps:
            rule.zero_grad()
            pixels = torch.tensor(client["pixel_values"][list(step)]).permute(0, 3, 1, 2)
            logits = model(input_ids=texts, pixel_values=pixels).logits_per_image
            labels = torch.tensor(client["labels"][list(step), 0]).long()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            rule.step()
        states.append({key: value.clone() for key, value in get_peft_model_state_dict(model).items()})
    mean = {}
    for key, (path, layer) in keys.items():
        value = sum(n / sum(EXAMPLES) * state[key] for n, state in zip(EXAMPLES, states, strict=True)).numpy().T
        mean.setdefault(path, {})[layer] = value
    return {
        path: layers[None] if None in layers else np.stack([layers[n] for n in sorted(layers)])
        for path, layers in mean.items()
    }


def test_a_round_with_adapters_in_both_towers_is_pytorch_s(tmp_path):
    from models.test_clip_parity import make_model

    clip_cases.CASES["clip"](tmp_path)
    make_model(tmp_path, 4)
    vlm, processor = open_model(tmp_path)
    vlm, processor = vlm.bind(processor, clip_cases.CLASSES, "a photo of a {}.")
    clients, modules = make_clients(processor, clip_cases.CLASSES), name_modules(vlm)
    params = load_weights(vlm, tmp_path)
    start, ours, _ = run_ours(vlm, params, clients, TARGETS, "fedavg-lora", None, "trained", RATES, frozen=False)
    theirs = run_theirs(tmp_path, clients, modules, start, processor.prompt_ids)
    assert ours["server"].keys() == theirs.keys()
    for tower in ("vision_tower/", "text_model/", "visual_projection", "text_projection"):
        for factor in "ab":
            paths = [path for path in theirs if path.startswith(tower) and path.endswith(f"/{factor}")]
            moved = norm(theirs[path] - start[path] for path in paths)
            error = norm(ours["server"][path] - theirs[path] for path in paths)
            print(f"{tower} {factor}: moved {moved:.3g}, error {error / moved:.1e} of that")  # noqa: T201
            assert moved > 0.005 * norm(start[path] for path in paths), "the round did too little to compare"
            assert error <= 1e-3 * moved
