"""The head of FedOTP (arXiv 2403.00041): soft prompts are matched with a picture's patches by optimal transport.

    logits_c = s Σ_mn T_mn ⟨I_m, T_nc⟩,    T from K = exp((⟨I_m, T_nc⟩ − 1) / ε), which is not differentiated through

Each of M patches gives 1/M, each of N prompts takes γ/N. In unbalanced transport a prompt takes exactly that, and no
patch has to give all that it has (the authors' `COT`); in balanced transport (γ = 1) each does. The iterations are of a
fixed number, so that a picture's logits do not depend on those beside it; the authors stop when a batch moves little.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

from fedvlm_jax.errors import UserError

ITERATIONS = 100
"""Turns of scaling rows and columns: the most that the authors take."""


def find_plan(
    log_kernel: Float[Array, "*batch M N"], share: Float[Array, ""], balanced: Bool[Array, ""]
) -> Float[Array, "*batch M N"]:
    """Find the plan diag(u) K diag(v) that gives 1/M a row, at most unless `balanced`, and takes share/N a column.

    K, u and v are kept as logarithms: in float32 K itself is 0 where a likeness is 87 ε below 1, and a row of zeros
    makes numbers that are not finite.

    >>> find_plan(jnp.zeros((2, 2)), jnp.float32(0.5), jnp.asarray(False)).tolist()
    [[0.125, 0.125], [0.125, 0.125]]
    """
    rows, columns = log_kernel.shape[-2:]
    largest = log_kernel.max(-2, keepdims=True)  # of a column; a factor of K that v takes over, which keeps digits
    kernel = log_kernel - largest

    def turn(_: Any, scales: tuple[Array, Array]) -> tuple[Array, Array]:
        u = -jnp.log(rows) - logsumexp(kernel + scales[1][..., None, :], axis=-1)
        u = jnp.where(balanced, u, jnp.minimum(u, 0))
        return u, jnp.log(share / columns) - logsumexp(kernel + u[..., None], axis=-2)

    u, v = jax.lax.fori_loop(0, ITERATIONS, turn, (jnp.zeros(kernel.shape[:-1]), largest[..., 0, :]))
    return jnp.exp(u[..., None] + kernel + v[..., None, :])


def logits(
    images: Float[Array, "B P E"], texts: Float[Array, "N C E"], leaves: Mapping[str, Any], scale: Float[Array, ""]
) -> Float[Array, "B C"]:
    """Compute logits; arguments are those of `Head`.

    Leaves: `epsilon` is ε, `share` is γ, `balanced` is 1 or 0.

    Raises:
        UserError: there are no patches.
    """
    if images.shape[1] < 2:
        raise UserError("this method compares patches of pictures: the model's features hold none (Vlm.see_patches)")
    leaves = jax.lax.stop_gradient(leaves)
    likeness = jnp.einsum("bme,nce->bcmn", images[:, 1:], texts, precision="highest")
    log_kernel = (jax.lax.stop_gradient(likeness) - 1) / leaves["epsilon"]
    plan = find_plan(log_kernel, leaves["share"], leaves["balanced"] > 0)
    return scale * (plan * likeness).sum((-2, -1))
