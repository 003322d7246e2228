"""The form of an adapter (`LoRA`), its start (`init`), and a walk over its sites."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from fedvlm_jax.lora.sites import LoraError, Site, Sites, join, select
from fedvlm_jax.utils import tree

Adapter = dict[str, Any]

COLLECTION = "lora"
FACTORS = ("a", "b", "scale")
GATE = "gate"
"""A fourth leaf that a site of an `nn.Dense` may have, [*stack, d_in, n]: the ranks are n groups of equal size, and
each token weighs them by softmax(x · gate)."""

SLOTS = "slots"
"""A fifth leaf beside a gate, [*stack, n, groups] of 0 and 1, where several of the gate's outputs may lead to one group
of ranks and some to none (their rows are zero). Each token keeps its best outputs, as many as there are groups that are
led to, and weighs them by a softmax over these alone."""

BOTTLENECK = ("down", "up")
"""Two leaves of a site after which a bottleneck stands, see `lora.bottleneck`; it need not have the factors too."""

PROMPT = "prompt"
"""The leaf of a soft prompt, [n, width], at the site of an `nn.Embed`: it is added to the embeddings of the n tokens
that follow the first."""

BESIDE = "beside"
"""The place in a layer that what stands beside it is added at: the name of a module that passes its output on."""

PARALLEL = ("into", "middle", "back")
"""The matrices of an adapter beside whole layers, see `lora.parallel`."""

DROPOUT = ("dropout_key", "dropout_rate")
"""Two leaves that `with_dropout` gives to a site for one training step: a key and a share, [*stack] each."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The form that an adapter is to have.

    Attributes:
        rank: columns of `a`, rows of `b`; at most min(d_in, d_out) of every target.
        alpha: numerator of the scale.
        targets: regular expressions, searched (`re.search`) in the sites' paths with and without the weight's name:
            `q_proj$`, `decoder/.*/(q|v)_proj/kernel`.
        exclude: sites that match one of these are left out again.
        rslora: scale = alpha / √rank (arXiv 2312.03732) instead of alpha / rank.
        init: how `a` starts. "gaussian": N(0, 1/rank²); "kaiming": U(±1/√d_in). Both are PEFT's
            for dense layers and convolutions; for embeddings PEFT starts the other way round, `a` at zero, `b` random.
        dtype: of `a` and `b`.
        prompt: vectors of a soft prompt; 0: there is none.
        prompt_at: path of the embedding that the soft prompt is added to.
        parallel: rank of adapters beside whole layers (`lora.parallel`); 0: there are none.
        parallel_at: paths of the stacks of layers that have them. `targets` is () where there are no low-rank factors.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | Sequence[str] = ".*"
    exclude: str | Sequence[str] = ()
    rslora: bool = False
    init: Literal["gaussian", "kaiming"] = "gaussian"
    dtype: Any = jnp.float32
    prompt: int = 0
    prompt_at: str = ""
    parallel: int = 0
    parallel_at: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The factor of the low-rank product.

        >>> LoRA(rank=8, alpha=16).scale
        2.0
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init(key: PRNGKeyArray, sites: Sites, spec: LoRA) -> Adapter:
    """Make a fresh adapter: `b` is zero, and so is a soft prompt, so it changes nothing yet.

    A site's key is folded from its path, so `a` does not depend on which others are adapted; a stack is one draw.

    Raises:
        LoraError: no site matches, a target cannot be adapted, or the rank is above min(d_in, d_out) somewhere.

    >>> from fedvlm_jax.lora import Site
    >>> adapter = init(jax.random.key(1), {"fc": Site("fc", "dense", (), (), (8,), (4,))}, LoRA(rank=2))
    >>> jax.tree.map(jnp.shape, adapter)
    {'fc': {'a': (8, 2), 'b': (2, 4), 'scale': ()}}
    """
    if spec.rank < 1:
        raise LoraError(f"rank must be at least 1, not {spec.rank}")
    if spec.init not in ("gaussian", "kaiming"):
        raise LoraError(f'init must be "gaussian" or "kaiming", not {spec.init!r}')
    flat = {}
    if spec.prompt:
        flat[join(spec.prompt_at, PROMPT)] = jnp.zeros((spec.prompt, sites[spec.prompt_at].d_out), spec.dtype)
    for path in spec.parallel_at if spec.parallel else ():
        flat |= _start_parallel(key, path, sites[f"{path}/mlp/fc2"], spec)
    for site in () if spec.targets == () else select(sites, spec.targets, spec.exclude):
        if spec.rank > min(site.d_in, site.d_out):
            raise LoraError(f"rank {spec.rank} is above min(d_in, d_out) of {site}: lower the rank or narrow targets")
        draw = fold_path(key, site.path)
        shape = (*site.stack, site.d_in, spec.rank)
        if spec.init == "gaussian":
            a = jax.random.normal(draw, shape, spec.dtype) / spec.rank
        else:
            a = jax.random.uniform(draw, shape, spec.dtype, -1, 1) / math.sqrt(site.d_in)
        flat[join(site.path, "a")] = a
        flat[join(site.path, "b")] = jnp.zeros((*site.stack, spec.rank, site.d_out), spec.dtype)
        flat[join(site.path, "scale")] = jnp.full(site.stack, spec.scale, jnp.float32)
    return tree.unflatten(flat)


def _start_parallel(key: PRNGKeyArray, path: str, last: Site, spec: LoRA) -> dict[str, Any]:
    """Make the leaves beside the layers of a stack, whose last weight has the site `last`."""
    place, rank, width = join(path, BESIDE), spec.parallel, last.d_out
    keys = jax.random.split(fold_path(key, place))
    deviation = math.sqrt(2 / rank)

    def draw(key: PRNGKeyArray, rows: int) -> Any:
        drawn = deviation * jax.random.normal(key, (*last.stack, rows, rank), spec.dtype)
        return jnp.concatenate([drawn, jnp.zeros((*last.stack, 1, rank), spec.dtype)], axis=-2)

    back = jnp.zeros((*last.stack, rank + 1, width), spec.dtype)
    leaves = {"into": draw(keys[0], width), "middle": draw(keys[1], rank), "back": back}
    return {join(place, name): leaf for name, leaf in (leaves | {"scale": jnp.ones(last.stack)}).items()}


def trainable(adapter: Adapter) -> dict[str, Any]:
    """Mark the leaves of an adapter that are to be trained, in optax's form of a mask: a tree of booleans.

    All but `scale` and `slots`, whose gradient is zero but which weight decay would move:
    `optax.adamw(1e-3, mask=trainable)`.

    >>> trainable({"fc": {"a": 1, "b": 2, "scale": 3}})
    {'fc': {'a': True, 'b': True, 'scale': False}}
    """
    return tree.unflatten({path: path.rpartition("/")[2] not in ("scale", SLOTS) for path in tree.flatten(adapter)})


def sites_of(adapter: Adapter) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """Walk an adapter: path and (a, b, scale) of every site, in the order of the paths."""
    flat = tree.flatten(adapter)
    for path in sorted({path.rpartition("/")[0] for path in flat}):
        if join(path, GATE) in flat:
            raise LoraError(f"the adapter at {path!r} has a gate: what it adds depends on the token, and is no matrix")
        if join(path, BOTTLENECK[0]) in flat:
            raise LoraError(f"the adapter at {path!r} has a bottleneck: its nonlinearity is no matrix")
        missing = [name for name in FACTORS if join(path, name) not in flat]
        here = {name.rpartition("/")[2] for name in flat if name.rpartition("/")[0] == path}
        if {"a", "b"} <= {*missing} and (others := sorted(here - {*FACTORS})):
            raise LoraError(
                f"the adapter at {path!r} is no low-rank matrix, but holds {', '.join(others)}: such an adapter is "
                "neither merged into weights nor written as a folder of PEFT's"
            )
        if missing:
            raise LoraError(f"the adapter at {path!r} lacks {', '.join(missing)}; is it one side of a partition?")
        yield path, tuple(flat[join(path, name)] for name in FACTORS)  # type: ignore[misc]


def low_rank(adapter: Adapter) -> Adapter:
    """Select the sites of an adapter that have low-rank factors; a soft prompt, say, is left out.

    >>> low_rank({"embed": {"prompt": 1}, "fc": {"a": 2, "b": 3, "scale": 4}})
    {'fc': {'a': 2, 'b': 3, 'scale': 4}}
    """
    flat = tree.flatten(adapter)
    return tree.partition(adapter, lambda path: join(path.rpartition("/")[0], "a") in flat)[0]


def with_dropout(key: PRNGKeyArray, adapter: Adapter, rate: float) -> Adapter:
    """Give an adapter dropout on its input for one training step, of this `key`: `y = f(x) + scale · (drop(x) a) b`.

    `drop` sets each number of x to 0 with chance `rate` < 1 and divides the others by `1 − rate`, as `lora_dropout` of
    PEFT does; every layer of a stack draws for itself. Embeddings have none, as in PEFT.
    """
    flat = tree.flatten(adapter)
    for path in sorted({path.rpartition("/")[0] for path in tree.flatten(low_rank(adapter))}):
        stack = flat[join(path, "scale")].shape
        site_key = fold_path(key, path)
        flat[join(path, DROPOUT[0])] = jax.random.split(site_key, stack) if stack else site_key
        flat[join(path, DROPOUT[1])] = jnp.full(stack, rate, jnp.float32)
    return tree.unflatten(flat)


def fold_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """Fold a site's path into a key, so that what is drawn there does not depend on the other sites."""
    # FNV-1a, cut to the 31 bits that `fold_in` takes: Python's `hash` of a text differs between processes.
    number = 2166136261
    for byte in path.encode():
        number = (number ^ byte) * 16777619 % 2**32
    return jax.random.fold_in(key, number >> 1)
