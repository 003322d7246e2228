"""A federated LoRA round as one writes it with transformers + PEFT, and the script that stores what it finds:
`PYTHONPATH=tests python tests/federation/pytorch_round.py` writes golden_round.npz. Needs the extra `parity`.

A loop over clients, SGD, a mean of state dicts. Nothing of fedvlm_jax is in it: the base is a folder that transformers
loads, and the start comes as arrays, `language_model/encoder/layers/fc1/a` [layers, d_in, rank].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from federation.round_case import ALPHA, BASE, CASES, FILE, GOLDEN_CASES, RANK, STEPS, draw_start, make_clients
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Florence2ForConditionalGeneration

TARGETS = r".*language_model\.(encoder|decoder)\.layers\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"

State = dict[str, torch.Tensor]


def load_model(folder: Path) -> torch.nn.Module:
    """The base with an adapter on every matrix of the text half; in evaluation mode, so without dropout."""
    model = Florence2ForConditionalGeneration.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).eval()


def to_torch(examples: dict[str, np.ndarray], rows: tuple[int, ...]) -> State:
    """These rows as transformers takes them: channels first, 64-bit ids."""
    batch = {name: torch.tensor(array[list(rows)]) for name, array in examples.items()}
    pixels = batch.pop("pixel_values").permute(0, 3, 1, 2)
    return {"pixel_values": pixels, **{name: ids.long() for name, ids in batch.items()}}


def train_client(
    model: torch.nn.Module, batches: list[State], clip: float | None, rates: tuple[float, float]
) -> list[float]:
    """One step of SGD per batch; returns the gradients' norms before clipping."""
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in factors.items() if "lora_A" in name], "lr": rates[0]},
        {"params": [p for name, p in factors.items() if "lora_B" in name], "lr": rates[1]},
    ]
    optimizer = torch.optim.SGD(groups)
    norms = []
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        limit = float("inf") if clip is None else clip
        norms.append(torch.nn.utils.clip_grad_norm_(factors.values(), limit).item())
        optimizer.step()
    return norms


def run_round(
    model: torch.nn.Module, start: State, is_shared: dict[str, bool], clip: float | None, rates: tuple[float, float]
) -> tuple[State, list[State], list[list[float]]]:
    """One round from a common start: the mean of what is shared, what each client keeps, its gradients' norms."""
    states, counts, norms = [], [], []
    for examples, steps in zip(make_clients(), STEPS, strict=True):
        set_peft_model_state_dict(model, start)
        norms.append(train_client(model, [to_torch(examples, rows) for rows in steps], clip, rates))
        states.append({name: value.clone() for name, value in get_peft_model_state_dict(model).items()})
        counts.append(len(examples["labels"]))
    total = sum(counts)
    mean = {
        name: sum(count / total * state[name] for count, state in zip(counts, states, strict=True))
        for name in start
        if is_shared[name]
    }
    private = [{name: value for name, value in state.items() if not is_shared[name]} for state in states]
    return mean, private, norms


def find_place(name: str) -> tuple[str, int]:
    """`….language_model.encoder.layers.1.fc1.lora_A.weight` -> `language_model/encoder/layers/fc1/a`, 1."""
    parts = name[name.index("language_model") :].split(".")
    layer = int(parts.pop(parts.index("layers") + 1))
    return "/".join([*parts[:-2], {"lora_A": "a", "lora_B": "b"}[parts[-2]]]), layer


def from_arrays(names: list[str], start: dict[str, np.ndarray]) -> State:
    """The start in PEFT's names and layout, layers apart."""
    places = {name: find_place(name) for name in names}
    return {name: torch.tensor(start[path][layer].T.copy()) for name, (path, layer) in places.items()}


def to_arrays(state: State) -> dict[str, np.ndarray]:
    """Undo `from_arrays`."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in state.items():
        path, layer = find_place(name)
        stacks.setdefault(path, {})[layer] = tensor.detach().numpy().T
    return {path: np.stack([layers[n] for n in sorted(layers)]) for path, layers in stacks.items()}


def find_sites(state: State) -> dict[str, tuple[int, int, int]]:
    """path -> layers, d_in, d_out."""
    shapes = {path: array.shape for path, array in to_arrays(state).items()}
    paths = {path.rpartition("/")[0] for path in shapes}
    return {path: (*shapes[f"{path}/a"][:2], shapes[f"{path}/b"][2]) for path in paths}


def answer(folder: Path, cases: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Factors after the round, `case/server/path` and `case/0/path` (client 0 keeps it), and norms, `case/norms`."""
    model, found = load_model(folder), {}
    fresh = get_peft_model_state_dict(model)
    for case in cases:
        method, clip, kind, rates = CASES[case]
        start = from_arrays(list(fresh), draw_start(kind, find_sites(fresh)))
        is_shared = {name: method != "plora" or "lora_B" in name for name in start}
        mean, private, norms = run_round(model, start, is_shared, clip, rates)
        found[f"{case}/norms"] = np.asarray(norms, np.float32)
        for owner, state in {"server": mean, "0": private[0], "1": private[1]}.items():
            found |= {f"{case}/{owner}/{path}": factor for path, factor in to_arrays(state).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **answer(BASE, GOLDEN_CASES))
