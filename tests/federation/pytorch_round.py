"""A federated LoRA round as one writes it with transformers + PEFT, and the script that stores what it finds:
`PYTHONPATH=tests:benchmarks python tests/federation/pytorch_round.py` writes golden_round.npz; needs the extra
`parity`.

A loop over clients, SGD, a mean of state dicts; its parts are those of the benchmark (benchmarks/pytorch_peft.py).
Nothing of fedvlm_jax is in it: the base is a folder that transformers loads, and the start comes as arrays,
`language_model/encoder/layers/fc1/a` [layers, d_in, rank].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from federation.round_case import ALPHA, BASE, CASES, FILE, GOLDEN_CASES, RANK, STEPS, draw_start, make_clients
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pytorch_peft import Places, State, average, from_arrays, load_model, to_arrays, to_torch, train_client

TARGETS = r".*language_model\.(encoder|decoder)\.layers\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def find_places(state: State) -> Places:
    """`….language_model.encoder.layers.1.fc1.lora_A.weight` -> `language_model/encoder/layers/fc1/a`, 1."""
    places = {}
    for name in state:
        parts = name[name.index("language_model") :].split(".")
        layer = int(parts.pop(parts.index("layers") + 1))
        places[name] = ("/".join([*parts[:-2], {"lora_A": "a", "lora_B": "b"}[parts[-2]]]), layer)
    return places


def run_round(
    model: torch.nn.Module, start: State, is_shared: dict[str, bool], clip: float | None, rates: tuple[float, float]
) -> tuple[State, list[State], list[list[float]]]:
    """One round from a common start: the mean of what is shared, what each client keeps, its gradients' norms."""
    states, counts, norms = [], [], []
    for examples, steps in zip(make_clients(), STEPS, strict=True):
        set_peft_model_state_dict(model, start)
        batches = [to_torch(examples, rows) for rows in steps]
        norms.append(train_client(model, batches, clip, rates, torch.optim.SGD))
        states.append({name: value.clone() for name, value in get_peft_model_state_dict(model).items()})
        counts.append(len(examples["labels"]))
    total = sum(counts)
    mean = {name: value for name, value in average(states, [n / total for n in counts]).items() if is_shared[name]}
    private = [{name: value for name, value in state.items() if not is_shared[name]} for state in states]
    return mean, private, norms


def find_sites(state: State) -> dict[str, tuple[int, int, int]]:
    """path -> layers, d_in, d_out."""
    shapes = {path: array.shape for path, array in to_arrays(find_places(state), state).items()}
    paths = {path.rpartition("/")[0] for path in shapes}
    return {path: (*shapes[f"{path}/a"][:2], shapes[f"{path}/b"][2]) for path in paths}


def answer(folder: Path, cases: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Factors after the round, `case/server/path` and `case/0/path` (client 0 keeps it), and norms, `case/norms`."""
    model, found = load_model(folder, RANK, ALPHA, TARGETS), {}
    fresh = get_peft_model_state_dict(model)
    for case in cases:
        method, clip, kind, rates = CASES[case]
        start = from_arrays(find_places(fresh), draw_start(kind, find_sites(fresh)))
        is_shared = {name: method != "plora" or "lora_B" in name for name in start}
        mean, private, norms = run_round(model, start, is_shared, clip, rates)
        found[f"{case}/norms"] = np.asarray(norms, np.float32)
        for owner, state in {"server": mean, "0": private[0], "1": private[1]}.items():
            found |= {f"{case}/{owner}/{path}": factor for path, factor in to_arrays(find_places(state), state).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **answer(BASE, GOLDEN_CASES))
