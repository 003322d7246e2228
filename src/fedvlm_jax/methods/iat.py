"""IAT (arXiv 2606.08687): encoders share B and keep A, the decoder shares A and keeps B.

The argument: covariate shift asks for a shared B, concept shift for a shared A. The equation was taken from a summary,
not from the paper itself.
"""

from fedvlm_jax import lora
from fedvlm_jax.methods.record import Method, Setup
from fedvlm_jax.methods.share import make_share_method

__all__ = ["DECODER", "ENCODERS", "make"]

ENCODERS = r"((^|/)encoder/|(^|/)vision_tower/|(^|/)image_projector/)"
DECODER = r"(^|/)decoder/"

SOURCE = "arXiv 2606.08687: B̄ = Σ p_k B_k in encoders, Ā = Σ p_k A_k in the decoder; the other factors are private"


def make(setup: Setup) -> Method:
    """iat, as a share rule."""
    rule = lora.Rule((rf"{ENCODERS}.*/b$", rf"{DECODER}.*/a$"))
    return make_share_method("iat", SOURCE, rule, setup)
