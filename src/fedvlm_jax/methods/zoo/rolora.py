"""RoLoRA (arXiv 2409.02346): odd rounds train and average B, even rounds A; the other is frozen, so it is exact."""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.factors import only
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method


def make(setup: Setup) -> Method:
    """Make rolora: a share rule with two phases."""
    source = "arXiv 2409.02346: B̄ = Σ p_k B_k in odd rounds (A frozen), Ā = Σ p_k A_k in even ones (B frozen)"
    unreached = "in 1 round rolora trains no A: even rounds do" if setup.rounds < 2 else ""
    parts = Parts(trained=(only("b"), only("a")), phase=lambda round_: (round_ - 1) % 2, unreached=unreached)
    return make_share_method("rolora", source, FACTORS, setup, parts)
