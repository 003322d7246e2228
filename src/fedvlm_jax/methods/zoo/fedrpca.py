"""FedRPCA (arXiv 2506.01194): the clients' updates are split into what they have in common and what is sparse.

M [d, K] holds a factor's updates as columns. Robust PCA, min ‖L‖_* + λ‖S‖_1 with L + S = M and λ = 1/√max(d, K), by the
alternating directions of principal component pursuit (arXiv 0912.3599), a fixed number of steps. Then mean(L) + β
mean(S): what is common is averaged, what is a client's own is averaged and amplified.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.rule_based import FACTORS, Parts, make_share_method
from fedvlm_jax.utils.option_ranges import Count, NonNegative


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of fedrpca"""

    beta: NonNegative = 2.0
    """Weight of the average of the clients' sparse parts."""
    steps: Count = 100
    """Iterations of the decomposition."""


def make(setup: Setup) -> Method:
    """Make fedrpca: a share rule with another average."""
    options = setup.own(Options)

    def average(shared: PyTree, messages: PyTree, weights: Float[Array, " cohort"], held: object) -> PyTree:
        del shared, held

        def average_leaf(update: Float[Array, "K ..."]) -> Array:
            counts = weights.reshape(-1, *[1] * (update.ndim - 1)) > 0
            columns = jnp.where(counts, update, 0)
            *stack, rows, width = columns.shape[1:]
            matrix = jnp.moveaxis(columns.reshape(len(weights), *stack, rows * width), 0, -1)  # [*stack, d, K]
            low, sparse = split(matrix, options.steps)
            mean = jnp.matmul(low + options.beta * sparse, weights, precision="highest")
            return mean.reshape(*stack, rows, width)

        return jax.tree.map(average_leaf, messages)

    source = "arXiv 2506.01194: [ΔA_k]_k = L + S by robust PCA (ΔB too); the update is mean(L) + β mean(S)"
    looked_for = "it takes out of the updates what is a client's own, which the method looks for and amplifies"
    lacking = "what a client lacks would count as a sparse part of its own, and be amplified"
    refuses = {"local.scaffold": looked_for, "lora.ranks": lacking}
    return make_share_method("fedrpca", source, FACTORS, setup, Parts(average=average, refuses=refuses))


def split(
    matrix: Float[Array, "*stack d K"], steps: int
) -> tuple[Float[Array, "*stack d K"], Float[Array, "*stack d K"]]:
    """Split a matrix into low rank and sparse; what is left after the last step goes to the sparse part."""
    rows, columns = matrix.shape[-2:]
    threshold = 1 / jnp.sqrt(max(rows, columns))
    total = jnp.sum(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    mu = rows * columns / (4 * jnp.maximum(total, 1e-12))

    def shrink(x: Array, by: Array) -> Array:
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - by, 0)

    def lower(x: Array) -> Array:
        """Shrink the singular values by 1/μ, from the Gram matrix of the few columns: x V f(s) Vᵀ."""
        squared, v = lora.one_by_one(jnp.linalg.eigh, jnp.matmul(x.mT, x, precision="highest"))
        s = jnp.sqrt(jnp.maximum(squared, 0))
        kept = jnp.maximum(s - 1 / mu[..., 0], 0) / jnp.maximum(s, 1e-30)
        return jnp.matmul(x, jnp.matmul(v * kept[..., None, :], v.mT, precision="highest"), precision="highest")

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        sparse, dual = state
        low = lower(matrix - sparse + dual / mu)
        sparse = shrink(matrix - low + dual / mu, threshold / mu)
        return sparse, dual + mu * (matrix - low - sparse)

    zero = jnp.zeros_like(matrix)
    sparse, dual = jax.lax.fori_loop(0, steps, step, (zero, zero))
    low = lower(matrix - sparse + dual / mu)
    return low, matrix - low
