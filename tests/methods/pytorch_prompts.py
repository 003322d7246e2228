"""The prompt methods' papers in PyTorch, on transformers' CLIP: forward passes, and a client's training with SGD.

`PYTHONPATH=tests:benchmarks python tests/methods/pytorch_prompts.py` stores the heads' answers in golden_heads.npz;
needs the extra `parity`. Nothing of fedvlm_jax is in it but the arrays that tests hand over.

Restated from ljaiverson/pFedMoAP (trainers/pfedmoap.py), HongxiaLee/FedOTP (trainers/GLP_OT.py), TianyuCuiOvO/FedPGP
(trainers/fedpgp.py) and sajjad-ucsb/pFedMMA (trainers/pFedMMA.py, clip/model.py).
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

FILE = Path(__file__).parent / "golden_heads.npz"
MATRICES = ("query", "key", "value", "output")


class Attention(nn.Module):
    """Multi-head attention whose scores are multiplied by a number of its own."""

    def __init__(self, width, heads, scaling):
        super().__init__()
        self.heads, self.scaling = heads, scaling
        self.maps = nn.ModuleDict({name: nn.Linear(width, width) for name in MATRICES})

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, queries, keys):
        q, k, v = (self.split(self.maps[n](x)) for n, x in (("query", queries), ("key", keys), ("value", keys)))
        mixed = (q @ k.transpose(-2, -1) * self.scaling).softmax(-1) @ v
        return self.maps["output"](mixed.transpose(1, 2).reshape(queries.shape))

    def load(self, gate):
        """Take our arrays: [in, heads, out] and [in, out], each with its bias."""
        width = len(gate["query"])
        for name in MATRICES:
            weight = np.asarray(gate[name]).reshape(width, width).T.copy()
            self.maps[name].weight.data = torch.tensor(weight)
            self.maps[name].bias.data = torch.tensor(np.asarray(gate[f"{name}_bias"]).reshape(width).copy())
        return self


def moap_logits(image, texts, gating, weight, scale):
    """Of unit features [B, E] and of [C, E] under each prompt, the own first."""
    local = scale * image @ texts[0].T
    if len(texts) == 1:
        return local
    stride = image.shape[-1] // gating.maps["query"].in_features
    pooled = image[:, ::stride]
    queries = pooled.repeat(len(texts[0]), 1, 1)  # [C, B, W]
    keys = torch.stack([text[:, ::stride] for text in texts]).permute(1, 0, 2)
    mixed = gating(queries, keys).permute(1, 2, 0)  # [B, W, C]
    return weight * local + scale * torch.bmm(pooled.unsqueeze(1), mixed).squeeze(1)


def transport_logits(patches, texts, epsilon, share, balanced, scale, turns=100):
    """Of unit features [B, M, E] and [N, C, E]; the authors' iterations without their early end."""
    (images, places, _), (prompts, classes, _) = patches.shape, texts.shape
    sim = torch.einsum("bmd,ncd->bcmn", patches, texts).reshape(-1, places, prompts)
    give = torch.full((images * classes, places), 1 / places)
    take = torch.full((images * classes, prompts), share / prompts)
    with torch.no_grad():
        kernel = torch.exp(-(1 - sim) / epsilon)
        u, v = torch.ones_like(give), torch.ones_like(take)
        for _ in range(turns):
            u = give / (kernel @ v.unsqueeze(-1)).squeeze(-1)
            if not balanced:
                u = torch.minimum(u, torch.ones_like(u))
            v = take / (kernel.transpose(1, 2) @ u.unsqueeze(-1)).squeeze(-1)
        plan = torch.diag_embed(u) @ kernel @ torch.diag_embed(v)
    return scale * (plan * sim).sum((1, 2)).reshape(images, classes)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Clip:
    """Transformers' model with soft prompts put in the place of words, and with adapters beside layers."""

    def __init__(self, folder, ids):
        from transformers import CLIPModel

        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(requires_grad=False)
        self.ids = torch.tensor(np.asarray(ids)).long()
        self.scale = self.model.logit_scale.exp()

    def words(self, count):
        """The embeddings that a prompt of so many vectors takes the place of."""
        return self.model.text_model.embeddings.token_embedding(self.ids[:1, 1 : 1 + count])[0]

    def texts(self, prompt=None):
        def put(module, args, out):
            return torch.cat([out[:, :1], prompt.expand(len(out), -1, -1), out[:, 1 + len(prompt) :]], dim=1)

        hook = None
        if prompt is not None:
            hook = self.model.text_model.embeddings.token_embedding.register_forward_hook(put)
        found = self.model.text_projection(self.model.text_model(input_ids=self.ids).pooler_output)
        if hook is not None:
            hook.remove()
        return functional.normalize(found, dim=-1)

    def images(self, pixels):
        """Unit features of pictures [B, H, W, 3]: [B, 1 + M, E], the whole picture's first."""
        hidden = self.model.vision_model(pixel_values=torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2))
        states = self.model.vision_model.post_layernorm(hidden.last_hidden_state)
        return functional.normalize(self.model.visual_projection(states), dim=-1)

    def beside(self, adapters, middle, alpha):
        """Put adapters [(into, back) of each layer] beside the top layers of both towers; -> what takes them away."""
        hooks = []
        for tower, name in ((self.model.text_model, "text_model"), (self.model.vision_model, "vision_tower")):
            layers = tower.encoder.layers
            for number, (into, back) in enumerate(adapters[name]):
                layer = layers[len(layers) - len(adapters[name]) + number]

                def add(module, args, kwargs, out, into=into, back=back, shared=middle[number]):
                    x = args[0] if args else kwargs["hidden_states"]
                    y = module.layer_norm1(Scaled.apply(x, alpha))
                    for matrix in (into, shared):
                        y = torch.relu(y @ matrix[:-1] + matrix[-1])
                    y = Scaled.apply((y @ back[:-1] + back[-1]) * alpha, 1 / alpha)
                    return (out[0] + y, *out[1:]) if isinstance(out, tuple) else out + y

                hooks.append(layer.register_forward_hook(add, with_kwargs=True))
        return lambda: [hook.remove() for hook in hooks]


def descend(values, rates, steps, loss):
    """SGD over steps of a loss on named tensors -> the tensors as they end."""
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    for step in steps:
        gradients = torch.autograd.grad(loss(values, step), list(values.values()), allow_unused=True)
        with torch.no_grad():
            values = {
                name: (value if gradient is None else value - rates(name) * gradient).requires_grad_()
                for (name, value), gradient in zip(values.items(), gradients, strict=True)
            }
    return {name: value.detach() for name, value in values.items()}


def make_cases():
    """Random unit features, a gate and the heads' logits."""
    torch.manual_seed(5)
    unit = {name: functional.normalize(torch.randn(*shape), dim=-1) for name, shape in
            {"images": (3, 5, 12), "texts": (3, 4, 12)}.items()}  # fmt: skip
    gating = Attention(6, 2, 10.0)
    stored = {name: value.numpy() for name, value in unit.items()}
    for name in MATRICES:
        stored[f"gate/{name}"] = gating.maps[name].weight.detach().numpy().T
        stored[f"gate/{name}_bias"] = gating.maps[name].bias.detach().numpy()
    image, patches, texts = unit["images"][:, 0], unit["images"][:, 1:], unit["texts"]
    with torch.no_grad():
        for count in (1, 2, 3):
            stored[f"moap/{count}"] = moap_logits(image, list(texts[:count]), gating, 0.5, 20.0).numpy()
        for balanced, share in ((True, 1.0), (False, 1.0), (False, 0.6)):
            found = transport_logits(patches, texts[:2], 0.1, share, balanced, 20.0)
            stored[f"transport/{int(balanced)}/{share}"] = found.numpy()
    return stored


if __name__ == "__main__":
    np.savez_compressed(FILE, **make_cases())
