"""A round of FedAvg over LoRA adapters as users of transformers + PEFT write it: a loop over clients on one base.

    python pytorch_peft.py MODEL WORLD        # an interpreter that has torch, transformers and peft

MODEL is a Hugging Face folder, WORLD a file that `harness/world.py` wrote: the clients' rows, which of them each
local step reads, and the adapter that all start from. Orders come as lines of JSON on stdin, and each is answered with
a line on stdout:

    {"threads": 2, "form": "float32", "vision": "cached", "clients": 4, "save": "after.npz"}  ->  {"seconds": 1.25}

Nothing of fedvlm_jax is in it. `form` is `float32` or `float64`; or `bfloat16`, the base's weights in that and the
adapter's in float32, as PEFT makes them; or `autocast`. Where PyTorch sees a GPU it computes there, and `float32` is
that and not TF32. `vision` is `cached`, the pictures' features given, or
`computed` in every step. The model is in evaluation mode: without dropout, which would only cost it time. Of a
decoder-only model the answer stands behind its prompt in one sequence, as transformers trains it; features are given
to one whose positions are a plain count (SmolVLM's, not Qwen-VL's).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.allow_tf32 = False  # matrix products have it off unless asked; convolutions have not

IGNORED = -100
TILED = ("smolvlm", "idefics3")
"""Kinds of models whose pictures are tiles [B, N, 3, H, W]; here each is one."""

State = dict[str, torch.Tensor]
Places = dict[str, tuple[str, int]]
"""Name in PEFT's state -> path of the factor in which it is a layer, and which."""


def load_model(
    folder: Path, rank: int, alpha: float, targets: str | list[str], dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The base with an adapter on the modules of these names; in evaluation mode, so without dropout."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    if dtype == torch.float64:
        model.loss_function = compute_cross_entropy if model.config.is_encoder_decoder else compute_next_cross_entropy
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = partial(normalise, module)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)).eval().to(DEVICE)


def compute_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """The model's own loss without what that does first: it rounds logits to float32, be they in float64."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def compute_next_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """The same of a decoder-only model, in which a token's logits are those of the next."""
    return compute_cross_entropy(logits[:, :-1], labels[:, 1:])


def normalise(norm: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Llama's norm without what it does first: it rounds to float32, too."""
    return norm.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def to_torch(examples: dict[str, np.ndarray], rows: Any) -> State:
    """These rows as transformers takes them: channels first, 64-bit ids; where the model computes."""
    batch = {name: torch.tensor(array[list(rows)]).to(DEVICE) for name, array in examples.items()}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
    return {name: value if value.is_floating_point() else value.long() for name, value in batch.items()}


def to_inputs(batch: State, config: Any) -> State:
    """A batch as a model of this configuration takes it."""
    if config.is_encoder_decoder:
        return batch
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        prompt, answer = ids[mask != 0], labels[labels != IGNORED]
        whole = torch.cat([prompt, answer])
        rows.append((whole, torch.ones_like(whole), torch.cat([torch.full_like(prompt, IGNORED), answer])))
    filled = zip(("input_ids", "attention_mask", "labels"), zip(*rows, strict=True), (0, 0, IGNORED), strict=True)
    joint = {name: pad_sequence(list(part), batch_first=True, padding_value=value) for name, part, value in filled}
    if "pixel_values" in batch and config.model_type in TILED:
        joint["pixel_values"] = batch["pixel_values"][:, None]
    return {**batch, **joint}


def compute_loss(model: torch.nn.Module, batch: State) -> torch.Tensor:
    """The model's own loss; where features are given they take the image tokens' places."""
    if "image_features" not in batch:
        return model(**batch).loss
    embedded = model.get_input_embeddings()(batch["input_ids"])
    is_image = (batch["input_ids"] == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(is_image, batch["image_features"].to(embedded.dtype))
    return model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss


def train_client(
    model: torch.nn.Module,
    batches: list[State],
    clip: float | None,
    rates: tuple[float, float],
    optimizer: type[torch.optim.Optimizer],
    context: Any = contextlib.nullcontext,
    **choices: Any,
) -> list[float]:
    """One optimiser step per batch, rates for A and B; returns the gradients' norms before clipping."""
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in factors.items() if "lora_A" in name], "lr": rates[0]},
        {"params": [p for name, p in factors.items() if "lora_B" in name], "lr": rates[1]},
    ]
    rule = optimizer(groups, **choices)
    norms = []
    for batch in batches:
        rule.zero_grad()
        with context():
            loss = compute_loss(model, batch)
        loss.backward()
        limit = float("inf") if clip is None else clip
        norms.append(torch.nn.utils.clip_grad_norm_(factors.values(), limit).item())
        rule.step()
    return norms


def average(states: list[State], weights: list[float]) -> State:
    """Σ p_k θ_k."""
    return {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]}


def name_places(modules: dict[str, list[str]]) -> Places:
    """Path of a site -> its modules by layer, as the places of what PEFT trains there."""
    return {
        f"base_model.model.{module}.lora_{side.upper()}.weight": (f"{path}/{side}", layer)
        for path, names in modules.items()
        for layer, module in enumerate(names)
        for side in "ab"
    }


def from_arrays(places: Places, start: dict[str, np.ndarray]) -> State:
    """The start in PEFT's names and layout, layers apart."""
    return {name: torch.tensor(start[path][layer].T.copy()).to(DEVICE) for name, (path, layer) in places.items()}


def to_arrays(places: Places, state: State) -> dict[str, np.ndarray]:
    """Undo `from_arrays`."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in state.items():
        path, layer = places[name]
        stacks.setdefault(path, {})[layer] = tensor.detach().cpu().numpy().T
    return {path: np.stack([layers[n] for n in sorted(layers)]) for path, layers in stacks.items()}


class Peer:
    """A model and a world, ready to run rounds."""

    def __init__(self, folder: Path, world: Path) -> None:
        self.folder, self.models = folder, {}
        with np.load(world) as file:
            arrays = dict(file)
        self.settings, self.modules = (json.loads(str(arrays.pop(name))) for name in ("settings", "modules"))
        self.places = name_places(self.modules)
        self.indices, self.weights = arrays.pop("indices"), arrays.pop("weights").tolist()
        self.start = {name.removeprefix("start/"): x for name, x in arrays.items() if name.startswith("start/")}
        examples = {name.removeprefix("example/"): x for name, x in arrays.items() if name.startswith("example/")}
        self.clients = [{name: x[client] for name, x in examples.items()} for client in range(len(self.indices))]
        self.batches: dict[Any, list[list[State]]] = {}

    def read(self, vision: str, dtype: torch.dtype, config: Any) -> list[list[State]]:
        """Every client's batches as tensors; made once, outside of what is timed."""
        if (vision, dtype) not in self.batches:
            unused = {"cached": "pixel_values", "computed": "image_features"}[vision]
            made = []
            for examples, steps in zip(self.clients, self.indices, strict=True):
                kept = {name: array for name, array in examples.items() if name != unused}
                batches = [to_inputs(to_torch(kept, rows), config) for rows in steps]
                made.append([{n: x.to(dtype) if x.is_floating_point() else x for n, x in b.items()} for b in batches])
            self.batches[vision, dtype] = made
        return self.batches[vision, dtype]

    def load(self, form: str) -> tuple[torch.nn.Module, State]:
        """The model in a form, and the start in its names."""
        kind = form if form in ("bfloat16", "float64") else "float32"
        if kind not in self.models:
            settings, targets = self.settings, [name for names in self.modules.values() for name in names]
            model = load_model(self.folder, settings["rank"], settings["alpha"], targets, getattr(torch, kind))
            if get_peft_model_state_dict(model).keys() != self.places.keys():
                raise SystemExit("the adapter has other sites than PEFT's")
            self.models[kind] = (model, from_arrays(self.places, self.start))
        return self.models[kind]

    def train(
        self, model: torch.nn.Module, start: State, steps: list[State], context: Any = contextlib.nullcontext
    ) -> State:
        """One client's round from a start, in the model that all share."""
        settings = self.settings
        set_peft_model_state_dict(model, start)
        rates = (settings["rate_a"], settings["rate_b"])
        train_client(model, steps, settings["clip_norm"], rates, torch.optim.AdamW, context, weight_decay=0.0)
        return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """One round: every client from the start, then their mean."""
        torch.set_num_threads(order["threads"])
        form = order["form"]
        model, start = self.load(form)
        clients = order.get("clients") or len(self.indices)
        batches = self.read(order["vision"], next(model.parameters()).dtype, model.config)[:clients]
        context = contextlib.nullcontext
        if form == "autocast":
            context = lambda: torch.autocast(DEVICE.type, torch.bfloat16)  # noqa: E731
        began = time.perf_counter()
        states = [self.train(model, start, steps, context) for steps in batches]
        mean = average(states, self.weights[:clients])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if order.get("save"):
            np.savez(order["save"], **to_arrays(self.places, mean))
        return {"seconds": seconds}


def main() -> None:
    """Take orders until stdin ends."""
    peer = Peer(Path(sys.argv[1]), Path(sys.argv[2]))
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(peer.run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
