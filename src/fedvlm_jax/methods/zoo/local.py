"""Local training: every client fine-tunes its own adapter and nothing ever leaves it. The one to beat."""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import NOTHING, Parts, make_share_method

SOURCE = "no communication: A_k and B_k stay private"
REFUSES: dict[str, str] = dict.fromkeys(
    ("server", "local.proximal", "local.scaffold", "train.weighting"), "nothing is shared, so there is no average"
)


def make(setup: Setup) -> Method:
    """local, as a share rule."""
    return make_share_method("local", SOURCE, NOTHING, setup, Parts(refuses=REFUSES, moot=frozenset(REFUSES)))
