"""FFA-LoRA (arXiv 2403.12313): A is drawn once, common to all, and frozen; B is averaged, which is exact."""

from dataclasses import replace

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.factors import only
from fedvlm_jax.methods.rule_based import FACTOR_B, Parts, make_share_method


def make(setup: Setup) -> Method:
    """Make ffa-lora: a share rule."""
    setup = replace(setup, common_start=True)  # B means something in the basis of one A
    source = "arXiv 2403.12313: A ≡ A_0 for all, B̄ = Σ p_k B_k"
    return make_share_method("ffa-lora", source, FACTOR_B, setup, Parts(trained=(only("b"),)))
