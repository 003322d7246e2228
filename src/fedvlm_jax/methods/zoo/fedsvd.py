"""FedSVD (arXiv 2505.12805): ffa-lora whose frozen A is renewed from the SVD of the product every few rounds.

In our layout A B = U Σ Vᵀ; A ← U, B ← Σ Vᵀ. The product stays as it is, and the columns of A become orthonormal. With
another A, B has another basis, in which what AdamW remembers means nothing: a client that meets one starts its
optimiser anew (the authors' code does so in every round).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.errors import format_count
from fedvlm_jax.methods.base import Method, MethodOptions, Number, Setup
from fedvlm_jax.methods.components.factors import map_sites, matmul, only
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method
from fedvlm_jax.utils.option_ranges import Count


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of fedsvd"""

    every: Count = 2
    """Rounds between two re-orthogonalisations."""


def make(setup: Setup) -> Method:
    """Make fedsvd: a share rule that does something to the average."""
    every = setup.own(Options).every
    source = "arXiv 2505.12805: B̄ = Σ p_k B_k with A frozen; every few rounds B̄ A = U Σ Vᵀ, A ← Vᵀ, B̄ ← U Σ"
    new_basis = "an SVD gives B another basis every few rounds, in which the state of former rounds means nothing"

    def renew(site: dict[str, Array]) -> dict[str, Array]:
        q, r = lora.one_by_one(jnp.linalg.qr, site["a"].astype(jnp.float32))
        u, s, vt = lora.one_by_one(lora.thin_svd, matmul(r, site["b"]))  # of the small R_a B alone
        a, b = lora.fix_signs(matmul(q, u), s[..., None] * vt)
        return {"a": a.astype(site["a"].dtype), "b": b.astype(site["b"].dtype)}

    def after(shared: PyTree, round_: Number) -> PyTree:
        now = round_ % every == 0
        return jax.tree.map(lambda new, old: jnp.where(now, new, old), map_sites(renew, shared), shared)

    rounds = format_count(setup.rounds, "round")
    never = f"in {rounds} fedsvd trains beside no renewed A: the first comes after round {every} (--method.every)"
    parts = Parts(
        trained=(only("b"),), after=after, basis=lambda round_: (round_ - 1) // every, fresh=every == 1,
        refuses=dict.fromkeys(("server", "local.scaffold"), new_basis),
        unreached=never if every >= setup.rounds else "",
    )  # fmt: skip
    return make_share_method("fedsvd", source, FACTORS, setup, parts)
