"""PFTT (arXiv 2404.13238v1): bottleneck adapters inside the frozen model are averaged, LoRA stays with its client.

    y ← y + gelu(y D + d) U + u after the layers that `--method.after` names, with D, d, U, u shared;
    y = x W_0 + s x A_k B_k where LoRA sits, with A_k and B_k private, of a rank of their own (`--lora.ranks`)

Published is that the adapters are global and averaged at the server, that LoRA is local, never averaged, and of a size
that may follow a client's data and means, and that both are trained on the client's task. The first version of the
paper has this method beside PFIT; the second makes one framework of the two. No code of its authors was found, so the
rest is ours: the adapters' form and places (Houlsby's, arXiv 1902.00751: after attention and feed-forward, see
`lora.bottleneck`), here in the text model alone; that both parts take every step together; averages by examples; the
start, at which neither changes anything. Bottlenecks have B's learning rate.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.lora.sites import search
from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.components.factors import only
from fedvlm_jax.methods.rule_based import Parts, make_share_method
from fedvlm_jax.utils.option_ranges import Count

SHARED = r"(^|/)(down|up)$"
SEED = 4711  # of the bottlenecks' start, with what the run's seed made of A


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of pftt"""

    width: Count = 16
    """Width of the shared bottlenecks (not given by the paper)."""
    after: Annotated[str, tyro.conf.arg(metavar="REGEX")] = "(out_proj|o_proj|fc2|down_proj)$"
    """Layers of the text model that a bottleneck comes after: those in whose path this is found. By default what
    attention and feed-forward give; '(fc2|down_proj)$' is after feed-forward alone (not given by the paper)."""

    def __post_init__(self) -> None:
        search(self.after, "")  # refuses what is no regular expression


def make(setup: Setup) -> Method:
    """Make pftt: a share rule for leaves that LoRA does not have."""
    source = (
        "arXiv 2404.13238v1: y + gelu(y D) U after attention and feed-forward, D̄ = Σ p_k D_k and Ū = Σ p_k U_k shared; "
        "LoRA, A_k and B_k, is private"
    )
    parts = Parts(extend=partial(extend, setup, setup.own(Options)), trained=(only("a", "b", "down", "up"),))
    return make_share_method("pftt", source, lora.Rule(SHARED), setup, parts)


def extend(setup: Setup, options: Options, adapter: lora.Adapter) -> lora.Adapter:
    """Give an adapter the bottlenecks; what they start from depends on its first number, and so on the run's seed.

    Raises:
        UserError: a bottleneck cannot come after the layers that the options name, or they name none.
    """
    first = jnp.ravel(jax.tree.leaves(adapter)[0])[0].astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(SEED), jax.lax.bitcast_convert_type(first, jnp.uint32))
    text = [pattern for part, pattern in setup.components.items() if part in ("encoder", "decoder")]
    inside = {path: site for path, site in setup.sites.items() if not text or re.match("|".join(text), path)}
    try:
        return lora.add_bottlenecks(key, adapter, inside, options.width, options.after, setup.spec.dtype)
    except lora.LoraError as error:
        raise UserError(f"--method.after {options.after!r}: {error}") from None
