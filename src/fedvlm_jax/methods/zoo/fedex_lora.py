"""FedEx-LoRA (arXiv 2410.09432): fedavg-lora, and what averaging the factors leaves out goes into the base.

E = Σ p_k A_k B_k − Ā B̄ in our layout (x A B), so that W_0 + s·(E + Ā B̄) is the exact mean of the clients' models.
"""

from dataclasses import replace

from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import (
    Aggregated,
    Context,
    Method,
    Setup,
    Travelling,
    Weights,
    broadcast_parts,
    shape_of_one,
)
from fedvlm_jax.methods.components import base_updates
from fedvlm_jax.methods.components.factors import deviations, map_sites
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method


def make(setup: Setup) -> Method:
    """Make fedex-lora: the share rule of fedavg-lora with a base that moves."""
    source = "arXiv 2410.09432: fedavg-lora, and W_0 ← W_0 + s (Σ p_k B_k A_k − B̄ Ā)"
    refuses = {
        "server": "what it adds to the base makes up for the plain average, and for no other step",
        "local.scaffold": "its control variates are gradients at a base that has moved by the next round",
        "lora.ranks": "a client that truncates the averaged factors has not the exact mean that the method is about",
    }
    averaging = make_share_method("fedex-lora", source, FACTORS, setup, Parts(refuses=refuses))

    def init(adapter: lora.Adapter) -> PyTree:
        return {**averaging.init(adapter=adapter), "base": base_updates.start(adapter, setup.places, setup.rounds)}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        def leave_out(before: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
            left, right = deviations(before["a"] + update["a"], before["b"] + update["b"], weights)
            return {"left": left, "right": right}

        left_out = map_sites(leave_out, server["shared"], messages)
        new, health = averaging.aggregate(ctx, server=server, messages=messages, weights=weights)
        return {**new, "base": base_updates.add(server["base"], left_out, server["start"], ctx.round)}, health

    def travels(server: PyTree, messages: PyTree) -> Travelling:
        del server
        up = shape_of_one(messages)
        return up, {"shared": up, "others": messages}  # the residual travels as the factors that it is made of

    return replace(
        averaging, init=init, aggregate=aggregate,
        base=lambda params, server: base_updates.apply(params, server["base"]), travels=travels,
        broadcast=broadcast_parts("shared", "base"), linear=False,
    )  # fmt: skip
