"""Local training: every client fine-tunes its own adapter and nothing ever leaves it. The one to beat."""

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.rule_based import NOTHING, Parts, make_share_method


def make(setup: Setup) -> Method:
    """Make local: a share rule that names nothing."""
    moot = ("server", "local.proximal", "local.scaffold", "train.weighting")
    refuses: dict[str, str] = dict.fromkeys(moot, "nothing is shared, so there is no average")
    refuses |= dict.fromkeys(("privacy", "participation.attack", "messages", "audit.keep"), "no client sends anything")
    parts = Parts(refuses=refuses, moot=frozenset(refuses), prompt="taken")
    return make_share_method("local", "no communication: A_k and B_k stay private", NOTHING, setup, parts)
