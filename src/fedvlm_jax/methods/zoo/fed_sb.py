"""Fed-SB (arXiv 2502.15436): ΔW = B R A with B and A frozen and common; only R, of rank × rank numbers, is trained.

Averaging R is exact. The paper takes A and B from the SVD of the first full gradients, and R starts at its singular
values, not at zero, so that the model has moved before the first step. Here, where no full gradient is ever formed, A
and B are random with orthonormal columns and rows, so that R has the norm of the update, and R starts at zero.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.low_rank import map_sites, matmul
from fedvlm_jax.methods.components.norms import only
from fedvlm_jax.methods.rule_based import Parts, make_share_method
from fedvlm_jax.utils import tree

SOURCE = (
    "arXiv 2502.15436: ΔW = B R A, B and A frozen; R̄ = Σ p_k R_k; here B and A are drawn and R starts at 0, "
    "the paper takes all three from the SVD of the first gradients"
)
REFUSES: dict[str, str] = {"lora.ranks": "R is one square matrix that all clients average whole"}
SEED = 977
"""The frozen factors are the same for everybody, whatever the run's seed makes of the adapter's A."""


def make(setup: Setup) -> Method:
    """fed-sb, as a share rule for a third factor."""
    setup = replace(setup, common_start=True)
    parts = Parts(extend=extend, assemble=assemble, trained=(only("r"),), refuses=REFUSES)
    return make_share_method("fed-sb", SOURCE, lora.Rule(r"(^|/)r$"), setup, parts)


def extend(adapter: lora.Adapter) -> dict[str, Array]:
    """Orthonormal a and b, and r = 0 between them."""

    def one(site: dict[str, Array]) -> dict[str, Array]:
        a, b = site["a"], site["b"]
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(SEED), b.shape[-1]), b.mT.shape, b.dtype)
        middle = jnp.zeros((*a.shape[:-2], a.shape[-1], a.shape[-1]), a.dtype)
        return {
            **site,
            "a": lora.one_by_one(jnp.linalg.qr, a)[0],
            "b": lora.one_by_one(jnp.linalg.qr, drawn)[0].mT,
            "r": middle,
        }

    return map_sites(one, adapter)


def assemble(factors: dict[str, Array]) -> lora.Adapter:
    """R is multiplied into B."""
    middle, adapter = tree.partition(factors, only("r"))
    return map_sites(lambda site, own: {**site, "b": matmul(own["r"], site["b"])}, adapter, middle)
