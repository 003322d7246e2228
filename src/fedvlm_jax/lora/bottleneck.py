"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751) after layers of a frozen model, in the tree of an adapter.

At the layers that have one an adapter holds, beside or without the factors of LoRA,

    down  [*stack, d_out + 1, width]   starts random; its last row, the bias, at zero
    up    [*stack, width + 1, d_out]   starts at zero, its last row is the bias too

and the layer's output y, LoRA's term included, becomes `y + gelu(y down + bias) up + bias`. A bias that is a row keeps
every leaf a matrix. The authors' code (google-research/adapter-bert) has this form, with a residual connection inside
and the same GELU, and starts both matrices at 0.001 times a normal number, where here the start is the identity.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, PRNGKeyArray

from fedvlm_jax.lora.adapter import BOTTLENECK, COLLECTION, Adapter, fold_path
from fedvlm_jax.lora.sites import LoraError, Site, Sites, join, select
from fedvlm_jax.utils import tree

DOWN, UP = BOTTLENECK


def add_bottlenecks(
    key: PRNGKeyArray,
    adapter: Adapter,
    sites: Sites,
    width: int,
    after: str | Sequence[str],
    dtype: jnp.dtype | type = jnp.float32,
) -> Adapter:
    """Give an adapter bottlenecks of this width after the layers whose paths match `after`; they change nothing yet.

    Raises:
        LoraError: no layer matches, or one that does is no `nn.Dense`.

    >>> from fedvlm_jax.lora import Site
    >>> sites = {"fc2": Site("fc2", "dense", (), (), (8,), (4,))}
    >>> jax.tree.map(jnp.shape, add_bottlenecks(jax.random.key(1), {}, sites, 2, "fc2$"))
    {'fc2': {'down': (5, 2), 'up': (3, 4)}}
    """
    flat = tree.flatten(adapter)
    for site in select(sites, after):
        if site.kind != "dense":
            raise LoraError(f"a bottleneck needs the output of an nn.Dense, and cannot come after {site}")
        shape = (*site.stack, site.d_out, width)
        down = jax.random.normal(fold_path(key, site.path), shape, dtype) / jnp.sqrt(jnp.asarray(site.d_out, dtype))
        flat[join(site.path, DOWN)] = jnp.concatenate([down, jnp.zeros((*site.stack, 1, width), dtype)], axis=-2)
        flat[join(site.path, UP)] = jnp.zeros((*site.stack, width + 1, site.d_out), dtype)
    return tree.unflatten(flat)


def pass_bottleneck(site: Site, module: nn.Module, out: Array) -> Array:
    """Compute a layer's output [..., d_out] behind its bottleneck, in the layer's own dtype.

    Raises:
        LoraError: the site has no `up`, is no `nn.Dense`, or a matrix has another shape.
    """
    down, up = (module.get_variable(COLLECTION, name) for name in BOTTLENECK)
    if not isinstance(module, nn.Dense) or up is None:
        raise LoraError(f"the bottleneck at {site.path} needs an nn.Dense, and 'down' and 'up'")
    width = down.shape[-1] if down.ndim else 0
    for name, leaf, expected in ((DOWN, down, (site.d_out + 1, width)), (UP, up, (width + 1, site.d_out))):
        if leaf.shape != expected:
            raise LoraError(f"the bottleneck's {join(site.path, name)} has shape {leaf.shape}, expected {expected}")
    y, down, up = promote_dtype(out, down, up, dtype=module.dtype)
    hidden = nn.gelu(jnp.matmul(y, down[:-1], precision=module.precision) + down[-1])
    return out + (jnp.matmul(hidden, up[:-1], precision=module.precision) + up[-1]).astype(out.dtype)
