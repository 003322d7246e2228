"""FedOTP (arXiv 2403.00041): a global and a private soft prompt, matched with patches by optimal transport.

The global prompt is averaged, the private one stays with its client. How pictures are compared with the two is
`models.clip.heads.transport`. As in the authors' code transport is unbalanced by default with all of a picture matched
(share 1), ε is 0.1, and the plan is not differentiated through. The private prompt begins with N(0, 0.02²) on the
words, because two prompts that begin alike would be trained alike; the authors draw both, without words.
"""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.components.factors import only
from fedvlm_jax.methods.components.soft_prompts import PROMPT_ALONE, draw_like, find_path, get_leaf, set_leaf
from fedvlm_jax.methods.rule_based import Parts, make_share_method

SEED = 41


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of fedotp"""

    epsilon: Annotated[float, Ge(1e-4)] = 0.1
    """Strength of the entropy in the cost of transport; below this bound rounding decides the plan."""
    share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of a picture that is matched, in unbalanced transport."""
    balanced: bool = False
    """Match every patch, all of it: balanced transport (Sinkhorn)."""


def make(setup: Setup) -> Method:
    """Make fedotp: a share rule for one of two prompts."""
    options, shared, private = setup.own(Options), find_path(setup), find_path(setup, "private")
    source = "arXiv 2403.00041: P̄ = Σ p_k P_k is shared, Q_k is private; both are matched with patches by transport"
    head = {
        "epsilon": options.epsilon,
        "share": 1.0 if options.balanced else options.share,
        "balanced": float(options.balanced),
    }

    def extend(adapter: lora.Adapter) -> PyTree:
        return set_leaf(adapter, private, draw_like(get_leaf(adapter, shared), SEED))

    def assemble(factors: PyTree) -> lora.Adapter:
        both = jnp.stack([get_leaf(factors, shared), get_leaf(factors, private)])
        leaves = {name: jnp.float32(value) for name, value in head.items()}
        return set_leaf({"head": {"transport": leaves}}, shared, both)

    parts = Parts(
        extend=extend, assemble=assemble, trained=(only("prompt", "private"),), refuses=PROMPT_ALONE, prompt="needed",
        patches=True,
    )  # fmt: skip
    return make_share_method("fedotp", source, lora.Rule(r"(^|/)prompt$"), setup, parts)
