"""Running a model with an adapter, by intercepting the calls of its layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from fedvlm_jax.lora.adapter import COLLECTION, DROPOUT, FACTORS, GATE, PARALLEL, PROMPT, SLOTS, Adapter
from fedvlm_jax.lora.bottleneck import DOWN, pass_bottleneck
from fedvlm_jax.lora.parallel import add_parallel
from fedvlm_jax.lora.sites import LoraError, Site, as_tuple, as_variables, join, listing, read_site
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

    >>> from fedvlm_jax import lora
    >>> model, x = nn.Dense(8), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> adapter = lora.init(jax.random.key(1), lora.find_sites(model.apply, params, x), lora.LoRA(rank=2))
    >>> three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), adapter)
    >>> jax.vmap(inject(model.apply), in_axes=(None, 0, None))(params, three, x).shape
    (3, 1, 8)
    """

    def fn(params: Mapping[str, Any], adapter: Adapter | None, *args: Any, **kwargs: Any) -> Any:
        variables = as_variables(params)
        if adapter is None:
            return apply_fn(variables, *args, **kwargs)
        read: set[str] = set()

        def add(next_fun: Callable[..., Any], args: Any, kw: Any, context: nn.module.InterceptorContext) -> Any:
            out = next_fun(*args, **kw)
            module = context.module
            if context.method_name not in ("__call__", "attend") or module.scope is None:
                return out
            if context.method_name == "__call__" and module.has_variable(COLLECTION, PROMPT):
                out = _add_prompt(module, out)
                read.add("/".join(module.path))
            if module.has_variable(COLLECTION, PARALLEL[0]):
                read.add("/".join(module.path))
                return add_parallel(module, *args)
            low_rank, narrow = (module.has_variable(COLLECTION, name) for name in ("a", DOWN))
            site = read_site(module) if low_rank or narrow else None
            if site is None:
                return out
            read.add(site.path)
            if low_rank:
                out = add_low_rank(site, context, args[0] if args else next(iter(kw.values())), out)
            return pass_bottleneck(site, module, out) if narrow else out

        def add_low_rank(site: Site, context: nn.module.InterceptorContext, inputs: Array, out: Array) -> Array:
            module, seen = context.module, inputs
            a, b, scale = (module.get_variable(COLLECTION, name) for name in FACTORS)
            _check_shapes(site, a, b, scale)
            scale = jax.lax.stop_gradient(scale)  # data: whoever differentiates by the whole adapter leaves it alone
            if site.kind != "embed" and module.has_variable(COLLECTION, DROPOUT[0]):
                key, rate = (module.get_variable(COLLECTION, name) for name in DROPOUT)
                kept = jax.random.bernoulli(key, 1 - rate, inputs.shape)
                inputs = jnp.where(kept, inputs / (1 - rate).astype(inputs.dtype), 0)
            shares: tuple[Array, ...] = ()
            if module.has_variable(COLLECTION, GATE):
                # Dropout drops what enters A; the router sees all of the layer's input.
                gate = module.get_variable(COLLECTION, GATE)
                slots = module.get_variable(COLLECTION, SLOTS) if module.has_variable(COLLECTION, SLOTS) else None
                shares = (_share_ranks(site, seen, a, gate, slots),)
            delta = _DELTAS[site.kind, context.method_name](module, inputs, a, b, scale, *shares)
            return out + delta.astype(out.dtype)

        with nn.intercept_methods(add):
            out = apply_fn({**variables, COLLECTION: adapter}, *args, **kwargs)
        _check_read(adapter, read, variables["params"])
        return out

    return fn


def _add_prompt(module: nn.Module, embedded: Array) -> Array:
    """Add a soft prompt to embeddings [..., T, width]: to those of the n tokens after the first."""
    path, prompt = "/".join(module.path), module.get_variable(COLLECTION, PROMPT)
    *_, tokens, width = embedded.shape
    if type(module) is not nn.Embed or prompt.ndim != 2 or prompt.shape[-1] != width or len(prompt) >= tokens:
        raise LoraError(
            f"the soft prompt at {path} has shape {prompt.shape}: it needs an nn.Embed, here of width {width}, and a "
            f"text of more tokens than it has vectors, here {tokens}"
        )
    before, after = 1, tokens - 1 - len(prompt)
    # Padded and added, not scattered: a client's own prompt under vmap then costs no scatter.
    return embedded + jnp.pad(prompt.astype(embedded.dtype), ((before, after), (0, 0)))


def _share_ranks(site: Site, x: Array, a: Array, gate: Array, slots: Array | None) -> Array:
    """Each token's weights of the ranks [..., rank]: softmax(x · gate) over n groups of them, in float32."""
    rank, outputs = a.shape[-1], gate.shape[-1]
    groups = outputs if slots is None else slots.shape[-1]
    fits = gate.shape == (a.shape[-2], outputs) and (slots is None or slots.shape == (outputs, groups))
    if site.kind != "dense" or not fits or rank % groups:
        raise LoraError(
            f"the gate at {site.path} has shape {gate.shape}: it needs an nn.Dense, and [d_in, n] with n, or the "
            f"columns of {SLOTS} [n, groups], a divisor of the rank {rank}"
        )
    scores = jnp.matmul(x.astype(jnp.float32), gate.astype(jnp.float32))
    if slots is None:
        shares = jax.nn.softmax(scores, axis=-1)
    else:
        slots = jax.lax.stop_gradient(slots).astype(jnp.float32)
        shares = jnp.matmul(_softmax_of_best(scores, slots), slots, precision="highest")
    return jnp.repeat(shares, rank // groups, axis=-1)


def _softmax_of_best(scores: Array, slots: Array) -> Array:
    """Softmax over each token's best outputs [..., n], as many as there are groups that outputs lead to."""
    leads = slots.any(axis=-1)
    scores = jnp.where(leads, scores, -jnp.inf)
    mine, other, place = scores[..., :, None], scores[..., None, :], jnp.arange(scores.shape[-1])
    ahead = (other > mine) | ((other == mine) & (place < place[:, None]))  # of equal ones the first
    best = leads & (ahead.sum(axis=-1) < slots.any(axis=-2).sum())
    return jax.nn.softmax(jnp.where(best, scores, -jnp.inf), axis=-1)


def _dense_delta(
    module: nn.Dense | nn.DenseGeneral, x: Array, a: Array, b: Array, scale: Array, shares: Array | None = None
) -> Array:
    x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
    # With the barrier the gradient of a is (gᵀ x)ᵀ. Without it XLA makes xᵀ g of it, and its CPU backend copies all of
    # x transposed for that: with one a per client that took four times as long.
    low = jnp.matmul(x, jax.lax.optimization_barrier(a.T).T, precision=module.precision) * scale.astype(x.dtype)
    if shares is not None:
        low = low * shares.astype(low.dtype)
    # The gradient of b is to be summed over one axis at a time: to sum over examples and rows at once, XLA's CPU
    # backend first copies the output's whole gradient transposed, a tenth of a training step. So examples are merged
    # into one axis of rows where that costs nothing, which on TPUs, whose memory holds rows in tiles, is where the rows
    # fill their tiles; elsewhere each example gets a copy of b.
    *examples, rows = low.shape[:-1] or (1,)
    if math.prod(examples) == 1 or rows % TILE == 0:
        merged = project(low.reshape(-1, low.shape[-1]), b, module.precision)
        return merged.reshape(*low.shape[:-1], -1)
    return project(low, jnp.broadcast_to(b, (*examples, *b.shape)), module.precision)


def _dense_general_delta(module: nn.DenseGeneral, x: Array, a: Array, b: Array, scale: Array) -> Array:
    axes = tuple(axis % x.ndim for axis in as_tuple(module.axis))
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    x = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
    delta = _dense_delta(module, x, a, b, scale)
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


_DELTAS: dict[tuple[str, str], Callable[..., Array]] = {
    ("dense", "__call__"): _dense_delta,
    ("dense_general", "__call__"): _dense_general_delta,
    ("conv", "__call__"): _conv_delta,
    ("embed", "__call__"): _embed_delta,
    ("embed", "attend"): _attend_delta,
}


def _check_shapes(site: Site, a: Any, b: Any, scale: Any) -> None:
    for name, leaf in zip(FACTORS, (a, b, scale), strict=True):
        if leaf is None:
            raise LoraError(f"the adapter at {site.path} has no {name!r}; a site needs a, b and scale")
    if site.obstacle:
        raise LoraError(f"{site.path} cannot be adapted: {site.obstacle}")
    rank = a.shape[-1] if a.ndim else 0
    wanted = ((site.d_in, rank), (rank, site.d_out), ())
    for name, leaf, expected in zip(FACTORS, (a, b, scale), wanted, strict=True):
        if leaf.shape != expected:
            weight = (*site.inputs, *site.outputs)
            raise LoraError(
                f"the adapter's {join(site.path, name)} has shape {leaf.shape} inside the layer, expected {expected} "
                f"for a weight of shape {weight} (stack axes of scanned layers are taken off by the scan)"
            )


def _check_read(adapter: Adapter, read: set[str], params: Mapping[str, Any]) -> None:
    unread = [path for path in tree.flatten(adapter) if path.rpartition("/")[0] not in read]
    if not unread:
        return
    weights = tree.flatten(params)
    why = "the model has no parameters at these paths: was the adapter made for another model?"
    if any(weight.startswith(path.rpartition("/")[0] + "/") for path in unread for weight in weights):
        why = (
            "this call read no parameters there through an nn.Dense, nn.DenseGeneral, nn.Conv or nn.Embed of exactly "
            'that type. Likely causes: a scan without variable_axes={"lora": 0}, an nn.Einsum or a bare self.param, a '
            "layer that this call does not reach, or a jax.jit inside the model whose trace is cached"
        )
    raise LoraError(
        f"these adapter leaves were never read, so they would silently do nothing:\n{listing(unread)}\n{why}"
    )
