"""Writes golden_peft.npz, what PEFT computes on single layers: `python tests/lora/make_golden.py`.

Needs the extra `parity`. `test_peft.py` holds our layers to the file without PyTorch, and calls the same functions for
a live comparison. Everything is in PyTorch's layouts: weights [out, in, …], images channels first. Convolutions are
not dilated, since PEFT 0.21 drops the dilation from its down-projection.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

FILE = Path(__file__).with_name("golden_peft.npz")
QUANTILES = np.linspace(0, 1, 33)

Arrays = dict[str, np.ndarray]


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Tied(nn.Module):
    """A language model in two layers: tokens are looked up and scored in one table."""

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012  PEFT reads it from the class

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.config = SimpleNamespace(to_dict=lambda: {"tie_word_embeddings": True})

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.tanh(self.embed_tokens(ids)))


# name -> (a layer, the shape of its input, how PEFT adapts it)
LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (2, 3, 7), {"r": 3, "lora_alpha": 6}),
    "linear_rslora": (lambda: nn.Linear(7, 5), (4, 7), {"r": 3, "lora_alpha": 6, "use_rslora": True}),
    "linear_no_bias": (lambda: nn.Linear(5, 9, bias=False), (4, 5), {"r": 4, "lora_alpha": 3}),
    "conv": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0)), (2, 3, 8, 7), {"r": 2, "lora_alpha": 5}),
    "conv_patch": (lambda: nn.Conv2d(3, 6, 4, 4), (2, 3, 8, 12), {"r": 5, "lora_alpha": 5, "use_rslora": True}),
}


def set_factors(config: LoraConfig, model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Adapt a model by PEFT and give its factors random values; B would be zero otherwise, and hide A."""
    model = get_peft_model(model, config)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for factor in factors.values():
            factor.copy_(0.5 * torch.randn(factor.shape))
    return model, factors


def answer_layer(name: str, seed: int) -> Arrays:
    """One adapted layer: its input and weights, output, gradients of ⟨output, cotangent⟩, merged weight."""
    torch.manual_seed(seed)
    make, shape, options = LAYERS[name]
    layer = make()
    found = {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    found = {key: value.detach().numpy().copy() for key, value in found.items()}
    model, factors = set_factors(LoraConfig(target_modules=["layer"], **options), OneLayer(layer))
    a, b = factors.values()
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    cotangent = torch.randn(y.shape)
    (y * cotangent).sum().backward()
    adapted = model.base_model.model.layer
    found |= {"scaling": np.float32(adapted.scaling["default"])}
    tensors = {"x": x, "a": a, "b": b, "y": y, "cotangent": cotangent, "grad_x": x.grad, "grad_a": a.grad}
    found |= {key: value.detach().numpy().copy() for key, value in (tensors | {"grad_b": b.grad}).items()}
    merged = model.merge_and_unload()
    return found | {"merged": merged.layer.weight.detach().numpy().copy()}


def answer_embedding(tied: bool, seed: int) -> Arrays:
    """An adapted table: looked up only, or also the output head.

    PEFT ties the head's factors to the table's by letting them share memory, but they are parameters of their own, each
    with the gradient of its own use. One adapter on one table has the sum of both, so that is what is stored.
    """
    torch.manual_seed(seed)
    model = Tied() if tied else OneLayer(nn.Embedding(11, 6))
    table = (model.embed_tokens if tied else model.layer).weight.detach().numpy().copy()
    target = "embed_tokens" if tied else "layer"
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[target], ensure_weight_tying=tied)
    model, _ = set_factors(config, model)
    ids = torch.tensor([[1, 7, 7, 0], [10, 3, 2, 7]])
    y = model(ids)
    cotangent = torch.randn(y.shape)
    (y * cotangent).sum().backward()
    inner = model.base_model.model
    embed = inner.embed_tokens if tied else inner.layer
    a, b = embed.lora_embedding_A["default"], embed.lora_embedding_B["default"]
    grad_a, grad_b = a.grad, b.grad
    if tied:
        head_a, head_b = inner.lm_head.lora_A["default"].weight, inner.lm_head.lora_B["default"].weight
        if not (torch.equal(head_b, a.T) and torch.equal(head_a, b.T)):
            raise RuntimeError("PEFT did not tie the head's adapter to the table's")
        grad_a, grad_b = grad_a + head_b.grad.T, grad_b + head_a.grad.T
    merged = table + embed.get_delta_weight("default").detach().numpy()
    tensors = {"x": ids, "a": a, "b": b, "y": y, "cotangent": cotangent, "grad_a": grad_a, "grad_b": grad_b}
    found = {key: value.detach().numpy().copy() for key, value in tensors.items()}
    return found | {"weight": table, "merged": merged, "scaling": np.float32(embed.scaling["default"])}


def draw_factors(kind: str, init: str, seed: int) -> Arrays:
    """How PEFT starts a layer: quantiles of A's entries, largest |B|."""
    torch.manual_seed(seed)
    layer = nn.Linear(512, 40) if kind == "linear" else nn.Conv2d(64, 40, 3)
    options = {"kaiming": True, "gaussian": "gaussian"}
    config = LoraConfig(r=32, target_modules=["layer"], init_lora_weights=options[init])
    adapted = get_peft_model(OneLayer(layer), config).base_model.model.layer
    a, b = (getattr(adapted, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    return {"quantiles": np.quantile(a, QUANTILES).astype(np.float32), "largest_b": np.float32(np.abs(b).max())}


def make(seed: int) -> dict[str, Arrays]:
    """case -> arrays."""
    found = {name: answer_layer(name, seed) for name in LAYERS}
    found |= {name: answer_embedding(name == "tied", seed) for name in ("embedding", "tied")}
    for kind in ("linear", "conv"):
        found |= {f"init_{kind}_{init}": draw_factors(kind, init, seed) for init in ("kaiming", "gaussian")}
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **{f"{case}/{key}": v for case, arrays in make(0).items() for key, v in arrays.items()})
