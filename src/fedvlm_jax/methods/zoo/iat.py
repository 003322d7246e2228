"""IAT (arXiv 2606.08687): encoders share B and keep A, the decoder shares A and keeps B.

The argument: covariate shift asks for a shared B, concept shift for a shared A. The equation was taken from a summary,
not from the paper itself. Its second half is not here: a regulariser, part of every client's loss, that keeps a round's
private drift orthogonal to the direction that is shared. Results of this file are those of the sharing rule alone.
"""

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import make_share_method

__all__ = ["DECODER", "ENCODERS", "make"]

ENCODERS = r"((^|/)encoder/|(^|/)vision_tower/|(^|/)image_projector/)"
DECODER = r"(^|/)decoder/"

SOURCE = "arXiv 2606.08687, its sharing rule alone: B̄ = Σ p_k B_k in encoders, Ā = Σ p_k A_k in the decoder"


def make(setup: Setup) -> Method:
    """iat, as a share rule."""
    rule = lora.Rule((rf"{ENCODERS}.*/b$", rf"{DECODER}.*/a$"))
    return make_share_method("iat", SOURCE, rule, setup)
