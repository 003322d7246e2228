"""Fed-SB (arXiv 2502.15436): ΔW = B R A with B and A frozen and common; only R, of rank × rank numbers, is trained.

Averaging R is exact. The paper takes A and B from the SVD of the first full gradients, and R starts at its singular
values, not at zero, so that the model has moved before the first step. Here, where no full gradient is ever formed, A
and B are random with orthonormal columns and rows, so that R has the norm of the update, and R starts at zero.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components.factors import map_sites, merge_middle, only
from fedvlm_jax.methods.rule_based import Parts, make_share_method
from fedvlm_jax.utils import tree

SEED = 977  # the frozen B is the same for everybody, whatever the run's seed makes of the adapter's A


def make(setup: Setup) -> Method:
    """Make fed-sb: a share rule for a third factor."""
    source = (
        "arXiv 2502.15436: ΔW = B R A, B and A frozen; R̄ = Σ p_k R_k; here B and A are drawn and R starts at 0, "
        "the paper takes all three from the SVD of the first gradients"
    )

    def extend(site: dict[str, Array]) -> dict[str, Array]:
        a, b = site["a"], site["b"]
        *stack, _, rank = a.shape
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(SEED), b.shape[-1]), b.mT.shape, b.dtype)
        orthonormal_a, orthonormal_b = (lora.one_by_one(jnp.linalg.qr, x)[0] for x in (a, drawn))
        return {**site, "a": orthonormal_a, "b": orthonormal_b.mT, "r": jnp.zeros((*stack, rank, rank), a.dtype)}

    def assemble(factors: PyTree) -> lora.Adapter:
        middle, adapter = tree.partition(factors, only("r"))
        return merge_middle(adapter, middle, "r")

    refuses = {
        "lora.ranks": "R is one square matrix that all clients average whole",
        "start": "its A and B are drawn with orthonormal columns and rows, and frozen",
    }
    parts = Parts(
        extend=lambda adapter: map_sites(extend, adapter), assemble=assemble, trained=(only("r"),), refuses=refuses
    )
    return make_share_method("fed-sb", source, lora.Rule(r"(^|/)r$"), replace(setup, common_start=True), parts)
