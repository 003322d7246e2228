"""Parallel adapters (pFedMMA, arXiv 2507.05394) beside whole layers of a frozen model, in the tree of an adapter.

At the place beside a stack's layers an adapter holds

    into   [*stack, d + 1, r]   starts random, N(0, 2/r); the last row of each matrix is a bias and starts at zero
    middle [*stack, r + 1, r]   starts random, N(0, 2/r)
    back   [*stack, r + 1, d]   starts at zero, so a fresh adapter is the identity
    scale  [*stack]             α

and the layer computes `f(x) + α · relu(relu(norm(x) into) middle) back`, where norm is the layer's first. Gradients of
the three matrices are those without α, as in the authors' code, which starts `back` at random too.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from fedvlm_jax.lora.adapter import COLLECTION, PARALLEL
from fedvlm_jax.lora.sites import LoraError


def add_parallel(module: nn.Module, normed: Array, out: Array) -> Array:
    """Add to a layer's output [..., d] what its parallel adapter makes of the normed input.

    Raises:
        LoraError: a matrix is missing or has another shape.
    """
    path, width = "/".join(module.path), out.shape[-1]
    into, middle, back, scale = (module.get_variable(COLLECTION, name) for name in (*PARALLEL, "scale"))
    rank = into.shape[-1] if into is not None and into.ndim else 0
    wanted = ((width + 1, rank), (rank + 1, rank), (rank + 1, width), ())
    for name, leaf, shape in zip((*PARALLEL, "scale"), (into, middle, back, scale), wanted, strict=True):
        if leaf is None or leaf.shape != shape:
            found = "nothing" if leaf is None else leaf.shape
            raise LoraError(f"the adapter's {path}/{name} has shape {found} inside the layer, expected {shape}")
    scale = jax.lax.stop_gradient(scale).astype(out.dtype)
    x, into, middle, back = promote_dtype(normed, into, middle, back, dtype=out.dtype)
    y = _scale_gradient(x, scale)
    for matrix in (into, middle):
        y = nn.relu(jnp.matmul(y, matrix[:-1]) + matrix[-1])
    y = jnp.matmul(y, back[:-1]) + back[-1]
    # α scales what is added, and not the gradient of what makes it.
    return out + scale * (jax.lax.stop_gradient(y) + _undo(y, scale))


def _scale_gradient(x: Array, scale: Array) -> Array:
    """Return x, whose gradient is `scale` times that of what comes back."""
    return jax.lax.stop_gradient(x) + scale * (x - jax.lax.stop_gradient(x))


def _undo(y: Array, scale: Array) -> Array:
    """Return zeros, whose gradient is that of y over `scale`; no gradient where that is 0."""
    return (y - jax.lax.stop_gradient(y)) * jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
