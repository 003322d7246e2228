"""The arithmetic of adapters: into the base and out again, sums of adapters, the nearest of a lower rank."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedvlm_jax.lora.adapter import Adapter, sites_of
from fedvlm_jax.lora.sites import LoraError, as_variables, join, listing
from fedvlm_jax.utils import tree


def merge(params: Mapping[str, Any], adapter: Adapter, *, dtype: Any = None) -> dict[str, Any]:
    """Write the adapter into the base: `W + scale · a b`, formed in float32; the answer has the form of `params`.

    `dtype` is that of the merged weights, each weight's by default; small updates drown in bfloat16, so widen it then.

    Raises:
        LoraError: the adapter has a site that the parameters lack, or of another shape.

    >>> adapter = {"fc": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.ones(())}}
    >>> merge({"fc": {"kernel": jnp.zeros((4, 3))}}, adapter)["fc"]["kernel"][0].tolist()
    [2.0, 2.0, 2.0]
    """
    deltas = {}
    for path, (a, b, scale) in sites_of(adapter):
        product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        deltas[path] = product * jax.lax.stop_gradient(scale)[..., None, None]
    return add_to_weights(params, deltas, dtype=dtype)


def unmerge(params: Mapping[str, Any], adapter: Adapter, *, dtype: Any = None) -> dict[str, Any]:
    """Undo `merge` to rounding: `W − scale · a b`."""
    leaves = tree.flatten(adapter).items()
    opposite = {path: -leaf if path.rpartition("/")[2] == "scale" else leaf for path, leaf in leaves}
    return merge(params, tree.unflatten(opposite), dtype=dtype)


def add_to_weights(params: Mapping[str, Any], deltas: Mapping[str, Array], *, dtype: Any = None) -> dict[str, Any]:
    """Add a matrix to the weight of every site that is named: path of the site -> ΔW [*stack, d_in, d_out].

    Raises:
        LoraError: the parameters lack a site, or its weight has another size.
    """
    variables = as_variables(params)
    weights = tree.flatten(variables["params"])
    for path, delta in deltas.items():
        name = next((n for w in ("kernel", "embedding") if (n := join(path, w)) in weights), None)
        if name is None:
            raise LoraError(f"the parameters have no kernel or embedding at {path!r}; there are:\n{listing(weights)}")
        weight = weights[name]
        stack, size = delta.shape[:-2], delta.shape[-2] * delta.shape[-1]
        if (*stack, size) != (*weight.shape[: len(stack)], math.prod(weight.shape[len(stack) :])):
            raise LoraError(f"an update of shape {delta.shape} at {path} does not fit a weight of shape {weight.shape}")
        weights[name] = (weight.astype(jnp.float32) + delta.reshape(weight.shape)).astype(dtype or weight.dtype)
    merged = tree.unflatten(weights)
    return {**variables, "params": merged} if variables is params else merged


def concatenate(*adapters: Adapter) -> Adapter:
    """Join adapters into one whose term is the sum of theirs; ranks add up, scales move into `b`, without a gradient.

    Raises:
        LoraError: the adapters do not have the same sites.

    >>> adapter = {"fc": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.ones(())}}
    >>> jax.tree.map(jnp.shape, concatenate(adapter, adapter))
    {'fc': {'a': (4, 4), 'b': (4, 3), 'scale': ()}}
    """
    sites = [dict(sites_of(adapter)) for adapter in adapters]
    for other in sites[1:]:
        if other.keys() != sites[0].keys():
            odd = sorted(other.keys() ^ sites[0].keys())
            raise LoraError(f"adapters to concatenate must have the same sites; not all have:\n{listing(odd)}")
    flat = {}
    for path in sites[0]:
        parts = [(a, b, jax.lax.stop_gradient(scale)) for a, b, scale in (site[path] for site in sites)]
        flat[join(path, "a")] = jnp.concatenate([a for a, _, _ in parts], axis=-1)
        flat[join(path, "b")] = jnp.concatenate([b * s[..., None, None].astype(b.dtype) for _, b, s in parts], axis=-2)
        flat[join(path, "scale")] = jnp.ones_like(parts[0][2])
    return tree.unflatten(flat)


def thin_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Decompose a matrix into u, s and vt of the smaller size."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def one_by_one(decompose: Callable[..., Any], *matrices: Array) -> Any:
    """`decompose` for every matrix of a stack [*stack, m, n] in turn, all stacks alike; the results are stacked again.

    A batched decomposition on a CPU waits for threads of the pool it runs in; several at once on a machine with few
    cores were seen to wait for each other for ever. One matrix at a time waits for nobody.
    """
    stack = matrices[0].shape[:-2]
    if not stack:
        return decompose(*matrices)
    found = jax.lax.map(lambda each: decompose(*each), tuple(x.reshape(-1, *x.shape[-2:]) for x in matrices))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)


def fix_signs(a: Array, b: Array) -> tuple[Array, Array]:
    """Make the largest entry of every column of `a` positive and keep the product: an SVD leaves signs to chance."""
    largest = jnp.take_along_axis(a, jnp.argmax(jnp.abs(a), axis=-2, keepdims=True), axis=-2)
    sign = jnp.where(largest < 0, -1, 1).astype(a.dtype)
    return a * sign, b * sign.mT


def truncate(adapter: Adapter, rank: int, *, even: bool = True) -> Adapter:
    """The best adapter of a lower rank in the Frobenius norm, by QR and a small SVD; ΔW itself is never formed.

    With a = Q_a R_a and bᵀ = Q_b R_b, ΔW = Q_a (R_a R_bᵀ) Q_bᵀ and only the small matrix in the middle is decomposed;
    signs are settled (`fix_signs`). Scales stay. Batched over stacked layers.

    The factors share the singular values evenly; without `even` all of them go to `b`, and the columns of `a` are
    orthonormal.

    Raises:
        LoraError: `rank` is below 1 or above what a site can have.
    """
    flat = {}
    for path, (a, b, scale) in sites_of(adapter):
        limit = min(a.shape[-2], b.shape[-1], a.shape[-1])
        if not 1 <= rank <= limit:
            raise LoraError(f"cannot truncate {path} to rank {rank}: it must be between 1 and {limit}")
        q_a, r_a = one_by_one(jnp.linalg.qr, a.astype(jnp.float32))
        q_b, r_b = one_by_one(jnp.linalg.qr, b.astype(jnp.float32).mT)
        u, s, vt = one_by_one(thin_svd, jnp.matmul(r_a, r_b.mT, precision="highest"))
        s = s[..., :rank]
        in_a, in_b = (jnp.sqrt(s), jnp.sqrt(s)) if even else (jnp.ones_like(s), s)
        new_a = jnp.matmul(q_a, u[..., :rank] * in_a[..., None, :], precision="highest")
        new_b = jnp.matmul(in_b[..., :, None] * vt[..., :rank, :], q_b.mT, precision="highest")
        new_a, new_b = fix_signs(new_a, new_b)
        flat |= {join(path, "a"): new_a.astype(a.dtype), join(path, "b"): new_b.astype(b.dtype)}
        flat[join(path, "scale")] = scale
    return tree.unflatten(flat)
