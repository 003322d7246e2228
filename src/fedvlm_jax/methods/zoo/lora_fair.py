"""LoRA-FAIR (arXiv 2411.14961): Ā as it is, B̄ corrected so that the product comes near the mean of the products.

In our layout (x A B) the correction of B̄ is ΔB = (ĀᵀĀ + λI)⁻¹ Āᵀ E with E = Σ p_k A_k B_k − Ā B̄, the ridge solution of
min ‖E − Ā ΔB‖² + λ‖ΔB‖²: the Frobenius form. The paper's own objective measures by cosine similarity.
"""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import tyro
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, MethodOptions, Setup, Weights
from fedvlm_jax.methods.components.factors import deviations, map_sites, matmul
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Positive


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of lora-fair"""

    lambda_: Annotated[Positive, tyro.conf.arg(name="lambda")] = 0.01
    """Ridge of the correction of B; at 0 the system that gives it may be singular."""


def make(setup: Setup) -> Method:
    """Make lora-fair: a share rule with another average."""
    ridge = setup.own(Options).lambda_
    source = "arXiv 2411.14961: Ā = Σ p_k A_k; B̄ + ΔB, ΔB = argmin ‖Σ p_k B_k A_k − (B̄ + ΔB) Ā‖² + λ‖ΔB‖²"
    refuses = {
        "server": "the correction of B fits the plain average of A, and no other step",
        "local.scaffold": "its control variates aim at the plain mean of B, which the method corrects",
        "lora.ranks": "the correction of B is fitted to all columns of A, of which such clients truncate some",
    }

    def average(shared: PyTree, messages: PyTree, weights: Weights, held: object) -> PyTree:
        del held

        def average_site(now: dict[str, Array], update: dict[str, Array]) -> dict[str, Array]:
            mean = tree.weighted_sum(update, weights)
            left, right = deviations(now["a"] + update["a"], now["b"] + update["b"], weights)
            a = now["a"] + mean["a"]
            gram = matmul(a.mT, a) + ridge * jnp.eye(a.shape[-1])
            correction = lora.one_by_one(jnp.linalg.solve, gram, matmul(matmul(a.mT, left), right))
            return {"a": mean["a"], "b": mean["b"] + correction}

        return map_sites(average_site, shared, messages)

    return make_share_method("lora-fair", source, FACTORS, setup, Parts(average=average, refuses=refuses))
