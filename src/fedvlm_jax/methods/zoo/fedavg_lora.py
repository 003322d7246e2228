"""FedAvg on LoRA factors (FedIT, arXiv 2305.05644): both factors are averaged, each on its own.

The mean of products is not the product of means: the error is Σ p_k (B_k − B̄)(A_k − Ā).
"""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import FACTORS, make_share_method


def make(setup: Setup) -> Method:
    """Make fedavg-lora: a share rule."""
    return make_share_method("fedavg-lora", "arXiv 2305.05644: Ā = Σ p_k A_k, B̄ = Σ p_k B_k", FACTORS, setup)
