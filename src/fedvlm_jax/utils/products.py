"""Matrix products whose gradients a CPU computes as fast as the products themselves.

The gradient of `left @ right` with respect to `right` is leftᵀ g, a sum over the rows of both. XLA's CPU backend has a
fast kernel for batches of products that sum over the left factor's last axis; those that sum over rows it gives to
another, several times slower where rows are few. So one factor is written down transposed first, behind a barrier,
since XLA would fold the transposition into the product again. Values are those of the plain products, and derivatives
of every kind are defined.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Product = Callable[[Array, Array], Array]


def project(
    low: Float[Array, "... m r"], right: Float[Array, "... r d"], precision: Any = None
) -> Float[Array, "... m d"]:
    """Compute `low @ right`, of few ranks r, with the same leading axes (arXiv 2106.09685, eq. 3).

    For the backward pass lowᵀ is kept in place of low.

    Raises:
        TypeError: shapes do not fit; so do the others.
    """
    multiply = partial(jnp.matmul, precision=precision)
    return _with_gradient(multiply, partial(_multiply_turned, precision=precision))(low, right)


def score(query: Float[Array, "... t d"], key: Float[Array, "... s d"]) -> Float[Array, "... t s"]:
    """Compute attention's scores `query @ keyᵀ` (arXiv 1706.03762, eq. 1); narrow types give float32.

    >>> score(jnp.ones((2, 3)), jnp.ones((4, 3))).shape
    (2, 4)
    """
    return _with_gradient(_score, partial(_in_backward_pass, _score_turned, _score))(query, key)


def mix(weights: Float[Array, "... t s"], value: Float[Array, "... s d"]) -> Float[Array, "... t d"]:
    """Compute `weights @ value`, what attention gives (arXiv 1706.03762, eq. 1)."""
    return _with_gradient(jnp.matmul, partial(_in_backward_pass, _multiply_turned, jnp.matmul))(weights, value)


def _with_gradient(multiply: Product, multiply_turned: Product) -> Product:
    """Make a product that is differentiated by its right factor as `multiply_turned`, which has the same values."""

    def differentiate(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
        (left, right), (left_dot, right_dot) = primals, tangents
        terms: list[Array] = []
        if not isinstance(left_dot, SymbolicZero):
            terms.append(multiply(left_dot, right))
        if not isinstance(right_dot, SymbolicZero):
            terms.append(multiply_turned(left, right_dot))
        return multiply(left, right), sum(terms[1:], start=terms[0])

    product: Any = jax.custom_jvp(multiply)
    product.defjvp(differentiate, symbolic_zeros=True)
    return product


def _in_backward_pass(on_cpu: Product, elsewhere: Product, left: Array, right_dot: Array) -> Array:
    """Multiply, linear in the second factor, with all that is done to the first done anew in the backward pass."""
    # So nothing is kept twice. Accelerators sum over rows as fast as over columns, and take the plain product.
    multiply = partial(jax.lax.platform_dependent, cpu=on_cpu, default=elsewhere)
    return jax.checkpoint(multiply, prevent_cse=False)(left, right_dot)


def _multiply_turned(left: Array, right_dot: Array, precision: Any = None) -> Array:
    """Compute `left @ right_dot`, of which the gradient is leftᵀ, as it stands in memory, times g."""
    turned = jax.lax.optimization_barrier(_drop_ones(left).swapaxes(-1, -2))
    right = jax.lax.optimization_barrier(_drop_ones(right_dot))
    out = jnp.einsum("...km,...kn->...mn", turned, right, precision=precision)
    return out.reshape(*left.shape[:-1], right_dot.shape[-1])


def _score(query: Array, key: Array) -> Array:
    kind = jnp.promote_types(jnp.result_type(query, key), jnp.float32)
    return jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=kind)


def _score_turned(query: Array, key_dot: Array) -> Array:
    """Compute `query @ key_dotᵀ`, of which the gradient is gᵀ, as it stands in memory, times the query."""
    out = jax.lax.optimization_barrier(_score(_drop_ones(key_dot), _drop_ones(query))).swapaxes(-1, -2)
    return out.reshape(*query.shape[:-1], key_dot.shape[-2])


def _drop_ones(x: Array) -> Array:
    # XLA folds no transposition across leading axes of length one.
    return x.reshape(*(length for length in x.shape[:-2] if length != 1), *x.shape[-2:])
