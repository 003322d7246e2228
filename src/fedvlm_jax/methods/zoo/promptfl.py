"""PromptFL (arXiv 2208.11625): one soft prompt for everybody, averaged; CoOp (arXiv 2109.01134) under FedAvg.

The vectors begin at the words of `--data.class-prompt`, the authors' at random. Low-rank factors that are trained
beside them are averaged as well.
"""

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.soft_prompts import PROMPT_ALONE
from fedvlm_jax.methods.rule_based import Parts, make_share_method

EVERYTHING = lora.Rule(r"(^|/)(a|b|prompt)$")


def make(setup: Setup) -> Method:
    """Make promptfl: a share rule that names everything."""
    source = "arXiv 2208.11625: P̄ = Σ p_k P_k, the soft prompt before the names of the classes"
    refuses = {name: PROMPT_ALONE[name] for name in ("lora.ranks", "start")}
    return make_share_method("promptfl", source, EVERYTHING, setup, Parts(prompt="needed", refuses=refuses))
