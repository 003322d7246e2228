"""pLoRA, the method of FedVLM (arXiv 2507.17088): B is averaged at the server, A stays with its client.

With B = 0 the first gradient of A is zero; only B moves. By default all clients start from one common A, because
averaging B mixes updates that are expressed in different subspaces otherwise; the paper does not say.
"""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import FACTOR_B, make_share_method


def make(setup: Setup) -> Method:
    """Make plora: a share rule."""
    return make_share_method("plora", "arXiv 2507.17088: B̄ = Σ p_k B_k is shared, A_k is private", FACTOR_B, setup)
