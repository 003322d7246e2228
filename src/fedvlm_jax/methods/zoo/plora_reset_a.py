"""plora whose private A begins anew in every round: what FED-ALoRA's public code does (arXiv 2509.25414).

The paper's rule is plora's, but the code loses the private A between rounds; so this is "share B, restart A". A client
answers with the A that it trained in its last round, beside the mean of B, as that code does. As B lives in the basis
that A gives it, the optimiser starts anew with A.
"""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import FACTOR_B, Parts, make_share_method


def make(setup: Setup) -> Method:
    """Make plora-reset-a: a share rule with a private part that begins anew."""
    source = "arXiv 2509.25414 as its code has it: B̄ = Σ p_k B_k is shared, A_k ← A_0 at the start of every round"
    return make_share_method("plora-reset-a", source, FACTOR_B, setup, Parts(restart=True))
