"""IAT (arXiv 2606.08687): encoders share B and keep A, the decoder shares A and keeps B.

The argument: covariate shift asks for a shared B, concept shift for a shared A. The equation was taken from a summary,
not from the paper itself. Its second half is not here: a regulariser, part of every client's loss, that keeps a round's
private drift orthogonal to the direction that is shared. Results of this file are those of the sharing rule alone.
"""

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import make_share_method


def find_halves(setup: Setup) -> tuple[str, str]:
    """Find regular expressions of the encoders' paths, vision and connector among them, and of the decoder's.

    Raises:
        UserError: the model has no encoder, as a decoder-only one has none.
    """
    parts = setup.components
    if parts and not {"encoder", "decoder"} <= parts.keys():
        raise UserError(f"iat tells encoder and decoder apart, and the model has only {', '.join(parts)}")
    encoders = "|".join(parts[name] for name in ("vision", "connector", "encoder") if name in parts)
    return f"^({encoders})", f"^{parts.get('decoder', '')}"


def make(setup: Setup) -> Method:
    """Make iat: a share rule."""
    source = "arXiv 2606.08687, its sharing rule alone: B̄ = Σ p_k B_k in encoders, Ā = Σ p_k A_k in the decoder"
    encoders, decoder = find_halves(setup)
    return make_share_method("iat", source, lora.Rule((f"{encoders}.*/b$", f"{decoder}.*/a$")), setup)
