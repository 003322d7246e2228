"""Running a model with an adapter, by intercepting the calls of its layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, PRNGKeyArray

from fedvlm_jax.lora.adapter import COLLECTION, DROPOUT, FACTORS, GATE, Adapter
from fedvlm_jax.lora.sites import (
    KINDS,
    Kind,
    LoraError,
    as_tuple,
    as_variables,
    count_inputs,
    find_obstacle,
    join,
    listing,
    weight_name,
)
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.products import project

TILE = 8
"""Rows of a tile in a TPU's memory."""


def inject(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a linen `Module.apply` into a function that takes an adapter: `fn(params, adapter, *args, **kwargs)`.

    `params` is the `params` collection or a whole variables dictionary, and stays an argument: nothing is copied or
    captured. With `adapter=None` the bare base runs. The low-rank term is computed in the layer's own dtype and works
    under jit, grad, vmap (over adapters with the base unbatched), `nn.remat` and `nn.scan`. The gradient of `scale` is
    zero; see `trainable` for optimisers that move what has none.

    Raises (while tracing):
        LoraError: an adapter leaf has the wrong shape, or none of the model's calls read it.

    Examples:
        >>> from flax import linen as nn
        >>> from fedvlm_jax import lora
        >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(2)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> adapter = lora.init(jax.random.key(1), lora.find_sites(model.apply, params, x), lora.LoRA(rank=2))
        >>> three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), adapter)
        >>> jax.vmap(inject(model.apply), in_axes=(None, 0, None))(params, three, x).shape
        (3, 1, 2)
    """

    def fn(params: Mapping[str, Any], adapter: Adapter | None, *args: Any, **kwargs: Any) -> Any:
        variables = as_variables(params)
        if adapter is None:
            return apply_fn(variables, *args, **kwargs)
        read: set[str] = set()

        def add(next_fun: Callable[..., Any], args: Any, kw: Any, context: nn.module.InterceptorContext) -> Any:
            out = next_fun(*args, **kw)
            module, kind = context.module, KINDS.get(type(context.module))
            if kind is None or module.scope is None or not module.has_variable(COLLECTION, "a"):
                return out
            if context.method_name not in ("__call__", "attend"):
                return out
            a, b, scale = (module.get_variable(COLLECTION, name) for name in FACTORS)
            _check_shapes(module, kind, a, b, scale)
            scale = jax.lax.stop_gradient(scale)  # data: whoever differentiates by the whole adapter leaves it alone
            read.add("/".join(module.path))
            seen = inputs = args[0] if args else next(iter(kw.values()))
            if kind != "embed" and module.has_variable(COLLECTION, DROPOUT[0]):
                inputs = _drop(inputs, *(module.get_variable(COLLECTION, name) for name in DROPOUT))
            if module.has_variable(COLLECTION, GATE):
                gate = module.get_variable(COLLECTION, GATE)
                delta = _gated_delta(module, kind, seen, inputs, a, b, scale, gate)
            else:
                delta = _DELTAS[context.method_name if kind == "embed" else kind](module, inputs, a, b, scale)
            return out + delta.astype(out.dtype)

        with nn.intercept_methods(add):
            out = apply_fn({**variables, COLLECTION: adapter}, *args, **kwargs)
        _check_read(adapter, read, variables["params"])
        return out

    return fn


def _drop(x: Array, key: PRNGKeyArray, rate: Array) -> Array:
    """Set numbers of x to 0 with chance `rate`, and divide the others by 1 − rate."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


def _dense_delta(module: nn.Dense, x: Array, a: Array, b: Array, scale: Array) -> Array:
    x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
    low = _project_down(x, a, module.precision) * scale.astype(x.dtype)
    return _project_up(low, b, module.precision)


def _project_down(x: Array, a: Array, precision: Any) -> Array:
    """x [..., d] times a [d, r], so that the gradient of a is computed as (gᵀ x)ᵀ.

    Without the barrier XLA makes xᵀ g of it, and its CPU backend copies all of x transposed for that: with one a per
    client that took four times as long.
    """
    return jnp.matmul(x, jax.lax.optimization_barrier(a.T).T, precision=precision)


def _project_up(low: Array, b: Array, precision: Any) -> Array:
    """low [..., T, r] times b [r, d], so that the gradient of b is summed over one axis at a time.

    To sum over examples and rows at once, XLA's CPU backend first copies the output's whole gradient transposed, a
    tenth of a training step. So examples are merged into one axis of rows where that costs nothing, which on TPUs,
    whose memory holds rows in tiles, is where T fills its tiles; elsewhere each example gets a b of its own.
    """
    *examples, rows = low.shape[:-1] or (1,)
    if math.prod(examples) == 1 or rows % TILE == 0:
        merged = project(low.reshape(-1, low.shape[-1]), b, precision)
        return merged.reshape(*low.shape[:-1], -1)
    return project(low, jnp.broadcast_to(b, (*examples, *b.shape)), precision)


def _gated_delta(
    module: Any, kind: Kind, seen: Array, x: Array, a: Array, b: Array, scale: Array, gate: Array
) -> Array:
    """Σ_i α_i x a_i b_i over the n groups of ranks, α = softmax(seen · gate), gate [d_in, n]; α in float32.

    `seen` is the layer's input and `x` what dropout leaves of it: it drops what enters A, and the router sees all.
    """
    groups = gate.shape[-1]
    if kind != "dense" or gate.shape != (a.shape[-2], groups) or a.shape[-1] % groups:
        raise LoraError(
            f"the gate at {'/'.join(module.path)} has shape {gate.shape}: it needs an nn.Dense, and [d_in, n] with n a "
            f"divisor of the rank {a.shape[-1]}"
        )
    shares = jax.nn.softmax(jnp.matmul(seen.astype(jnp.float32), gate.astype(jnp.float32)), axis=-1)
    x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
    low = _project_down(x, a, module.precision) * scale.astype(x.dtype)
    low = low * jnp.repeat(shares, a.shape[-1] // groups, axis=-1).astype(low.dtype)
    return _project_up(low, b, module.precision)


def _dense_general_delta(module: nn.DenseGeneral, x: Array, a: Array, b: Array, scale: Array) -> Array:
    axes = tuple(axis % x.ndim for axis in as_tuple(module.axis))
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    x = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
    delta = _dense_delta(module, x, a, b, scale)  # type: ignore[arg-type]
    return delta.reshape(*delta.shape[:-1], *as_tuple(module.features))


def _conv_delta(module: nn.Conv, x: Array, a: Array, b: Array, scale: Array) -> Array:
    # The down-projection is the same convolution with `rank` filters; the up-projection is pointwise.
    window = as_tuple(module.kernel_size)
    down = module.clone(features=a.shape[-1], use_bias=False, name=None, parent=None)
    low = down.apply({"params": {"kernel": a.reshape(*window, -1, a.shape[-1])}}, x)
    low, b = promote_dtype(low, b, dtype=module.dtype)
    return jnp.matmul(low * scale.astype(low.dtype), b, precision=module.precision)


def _embed_delta(module: nn.Embed, ids: Array, a: Array, b: Array, scale: Array) -> Array:
    a, b = promote_dtype(a, b, dtype=module.dtype)
    # Out-of-range ids give NaN in `jnp.take`; the base's own lookup has already shown them.
    return jnp.matmul(jnp.take(a, ids, axis=0, mode="clip") * scale.astype(a.dtype), b)


def _attend_delta(module: nn.Embed, query: Array, a: Array, b: Array, scale: Array) -> Array:
    query, a, b = promote_dtype(query, a, b, dtype=module.dtype)
    return jnp.matmul(jnp.matmul(query, b.T) * scale.astype(query.dtype), a.T)


_DELTAS: dict[str, Callable[..., Array]] = {
    "dense": _dense_delta,
    "dense_general": _dense_general_delta,
    "conv": _conv_delta,
    "__call__": _embed_delta,
    "attend": _attend_delta,
}


def _check_shapes(module: nn.Module, kind: Kind, a: Any, b: Any, scale: Any) -> None:
    path = "/".join(module.path)
    for name, leaf in zip(FACTORS, (a, b, scale), strict=True):
        if leaf is None:
            raise LoraError(f"the adapter at {path} has no {name!r}; a site needs a, b and scale")
    weight = module.get_variable("params", weight_name(kind))
    split = count_inputs(module, weight.shape)
    if obstacle := find_obstacle(module):
        raise LoraError(f"{path} cannot be adapted: {obstacle}")
    d_in, d_out = math.prod(weight.shape[:split]), math.prod(weight.shape[split:])
    rank = a.shape[-1] if a.ndim else 0
    wanted = ((d_in, rank), (rank, d_out), ())
    for name, leaf, shape in zip(FACTORS, (a, b, scale), wanted, strict=True):
        if leaf.shape != shape:
            raise LoraError(
                f"the adapter's {join(path, name)} has shape {leaf.shape} inside the layer, expected {shape} for a "
                f"weight of shape {weight.shape} (stack axes of scanned layers are taken off by the scan)"
            )


def _check_read(adapter: Adapter, read: set[str], params: Mapping[str, Any]) -> None:
    unread = [path for path in tree.flatten(adapter) if path.rpartition("/")[0] not in read]
    if not unread:
        return
    weights = tree.flatten(params)
    known = [path for path in unread if any(w.startswith(path.rpartition("/")[0] + "/") for w in weights)]
    why = (
        "this call read no parameters there through an nn.Dense, nn.DenseGeneral, nn.Conv or nn.Embed of exactly that "
        'type. Likely causes: a scan without variable_axes={"lora": 0}, an nn.Einsum or a bare self.param, a layer '
        "that this call does not reach, or a jax.jit inside the model whose trace is cached"
        if known
        else "the model has no parameters at these paths: was the adapter made for another model?"
    )
    raise LoraError(
        f"these adapter leaves were never read, so they would silently do nothing:\n{listing(unread)}\n{why}"
    )
