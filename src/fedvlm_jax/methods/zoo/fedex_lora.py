"""FedEx-LoRA (arXiv 2410.09432): fedavg-lora, and what averaging the factors leaves out goes into the base.

E = Σ p_k A_k B_k − Ā B̄ in our layout (x A B), so that W_0 + s·(E + Ā B̄) is the exact mean of the clients' models.
"""

from dataclasses import replace

from fedvlm_jax import lora
from fedvlm_jax.methods.base import (
    Aggregated,
    Context,
    Message,
    Method,
    Server,
    Setup,
    Travelling,
    Weights,
    shape_of_one,
)
from fedvlm_jax.methods.components import base_updates
from fedvlm_jax.methods.components.low_rank import by_site, deviations
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method

SOURCE = "arXiv 2410.09432: fedavg-lora, and W_0 ← W_0 + s (Σ p_k B_k A_k − B̄ Ā)"
REFUSES: dict[str, str] = {
    "server": "what it adds to the base makes up for the plain average, and for no other step",
    "local.scaffold": "its control variates are gradients at a base that has moved by the next round",
    "lora.ranks": "a client that truncates the averaged factors has not the exact mean that the method is about",
}


def make(setup: Setup) -> Method:
    """fedex-lora: the share rule of fedavg-lora with a base that moves."""
    averaging = make_share_method("fedex-lora", SOURCE, FACTORS, setup, Parts(refuses=REFUSES))

    def init(adapter: lora.Adapter) -> Server:
        rank = setup.places * next(iter(by_site(adapter).values()))["a"].shape[-1]
        return {**averaging.init(adapter=adapter), "base": base_updates.start(adapter, rank, setup.rounds)}

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> Aggregated:
        scales, before, updates = by_site(server["start"]), by_site(server["shared"]), by_site(messages)
        left_out = {}
        for path, update in updates.items():
            a, b = (before[path][name] + update[name] for name in "ab")
            left, right = deviations(a, b, weights)
            left_out[path] = (left * scales[path]["scale"][..., None, None], right)
        new, health = averaging.aggregate(ctx, server=server, messages=messages, weights=weights)
        return {**new, "base": base_updates.add(server["base"], left_out, ctx.round)}, health

    def travels(server: Server, messages: Message) -> Travelling:
        del server
        up = shape_of_one(messages)
        return up, {"shared": up, "others": messages}  # the residual travels as the factors that it is made of

    return replace(
        averaging, init=init, aggregate=aggregate,
        base=lambda params, server: base_updates.apply(params, server["base"]), travels=travels,
    )  # fmt: skip
