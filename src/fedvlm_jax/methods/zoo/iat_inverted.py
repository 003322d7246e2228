"""IAT the other way round: encoders share A and keep B, the decoder shares B and keeps A. The control for `iat`."""

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import make_share_method
from fedvlm_jax.methods.zoo.iat import find_halves


def make(setup: Setup) -> Method:
    """Make iat-inverted: a share rule."""
    source = "ours, arXiv 2606.08687 inverted: Ā = Σ p_k A_k in encoders, B̄ = Σ p_k B_k in the decoder"
    encoders, decoder = find_halves(setup)
    return make_share_method("iat-inverted", source, lora.Rule((f"{encoders}.*/a$", f"{decoder}.*/b$")), setup)
