"""FedSA-LoRA (arXiv 2410.01463): A is averaged, B stays with its client."""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import FACTOR_A, make_share_method


def make(setup: Setup) -> Method:
    """Make fedsa-lora: a share rule."""
    return make_share_method("fedsa-lora", "arXiv 2410.01463: Ā = Σ p_k A_k is shared, B_k is private", FACTOR_A, setup)
