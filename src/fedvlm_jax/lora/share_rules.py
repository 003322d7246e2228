"""Rules: which leaves of an adapter leave the client, which stay, which are trained."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedvlm_jax.lora.adapter import BOTTLENECK, FACTORS, PARALLEL, PROMPT, Adapter
from fedvlm_jax.lora.sites import LoraError, Sites, as_patterns, join, listing, search
from fedvlm_jax.utils import tree


@dataclasses.dataclass(frozen=True)
class Rule:
    """Names leaves of an adapter: those that one of `include` is found in and none of `exclude`.

    Regular expressions are searched in the leaves' paths, `decoder/layers/fc1/b`, and for stacked layers in their
    virtual paths, `decoder/layers/3/fc1/b`; those of a soft prompt's vectors are `token_embedding/prompt/0` and so on.
    An empty `include` is the one rule that may match nothing.
    """

    include: str | Sequence[str]
    exclude: str | Sequence[str] = ()


def partition(
    adapter: Adapter, rule: str | Rule | Callable[[str], bool], sites: Sites | None = None
) -> tuple[Adapter, Adapter]:
    """Split an adapter into what `rule` names (shared) and the rest (personal). `combine` undoes it.

    A stacked leaf whose layers go to different sides becomes, on each side, a small dictionary from the layer's index
    to its slice: `{"a": {"0": …, "2": …}}`. Slicing is all that happens to arrays; it works under jit.

    Args:
        adapter: a tree as `init` makes it (leaves may be shapes when no layer is split from its stack).
        rule: a regular expression, a `Rule`, or a function of the (virtual) path.
        sites: tell where in a path the layer's index stands. Without them a regular expression is tried with the index
            in every place, and a function that depends on the place is an error.

    Raises:
        LoraError: the rule matches nothing (the message lists the paths), or cannot be decided without `sites`.

    >>> adapter = {"fc": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.ones(())}}
    >>> shared, personal = partition(adapter, r"/b$")
    >>> list(shared["fc"]), list(personal["fc"])
    (['b'], ['a', 'scale'])
    """
    if isinstance(rule, Rule) and not as_patterns(rule.include):
        return {}, tree.unflatten(tree.flatten(adapter))  # whatever leaves there are, also at no site
    shared: dict[str, Any] = {}
    personal: dict[str, Any] = {}
    for path, leaf in tree.flatten(adapter).items():
        named = {index: _names(rule, path, index, sites) for index in np.ndindex(*_stack_of(adapter, path))}
        if len(set(named.values())) < 2:  # the whole stack goes to one side
            (shared if any(named.values()) else personal)[path] = leaf
            continue
        for index, is_shared in named.items():
            (shared if is_shared else personal)[f"{path}/{'.'.join(map(str, index))}"] = leaf[index]
    if not shared:
        paths = [v for path in tree.flatten(adapter) for v in virtual_paths(adapter, path, sites)]
        raise LoraError(f"the rule {rule!r} matches no leaf of the adapter; there are:\n{listing(paths)}")
    return tree.unflatten(shared), tree.unflatten(personal)


def combine(shared: Adapter, personal: Adapter) -> Adapter:
    """Undo `partition`: join two trees of disjoint leaves and stack split layers again.

    Raises:
        LoraError: both trees hold a leaf, or layers of a stack are missing.

    >>> sorted(combine({"fc": {"b": 1}}, {"fc": {"a": 2, "scale": 3}})["fc"].items())
    [('a', 2), ('b', 1), ('scale', 3)]
    """
    flat: dict[str, Any] = {}
    layers: dict[str, dict[tuple[int, ...], Any]] = {}
    try:
        joined = tree.flatten(tree.combine(shared, personal))
    except ValueError as error:
        raise LoraError(str(error)) from None
    for path, leaf in joined.items():
        head, _, last = path.rpartition("/")
        # A layer may itself be called "0": below a factor's name only an index can stand.
        if head.rpartition("/")[2] in (*FACTORS, *BOTTLENECK, PROMPT) and re.fullmatch(r"\d+(\.\d+)*", last):
            layers.setdefault(head, {})[tuple(map(int, last.split(".")))] = leaf
        else:
            flat[path] = leaf
    for path, slices in layers.items():
        shape = tuple(max(axis) + 1 for axis in zip(*slices, strict=True))
        missing = [index for index in np.ndindex(*shape) if index not in slices]
        if missing:
            raise LoraError(f"{path} was split by layer and these layers are missing: {missing}")
        stacked = jnp.stack([slices[index] for index in np.ndindex(*shape)])
        flat[path] = stacked.reshape(*shape, *stacked.shape[1:])
    return tree.unflatten(flat)


def virtual_paths(adapter: Adapter, path: str, sites: Sites | None = None) -> list[str]:
    """List all paths that a leaf answers to: one per layer where it is stacked and `sites` are known, else `path`.

    A soft prompt answers to those of its vectors.
    """
    stack = _stack_of(adapter, path)
    if not stack or sites is None:
        return [path]
    return [next(_place_index(path, index, sites)) for index in np.ndindex(*stack)]


def _names(rule: str | Rule | Callable[[str], bool], path: str, index: tuple[int, ...], sites: Sites | None) -> bool:
    paths = [path, *_place_index(path, index, sites)] if index else [path]
    if isinstance(rule, str):
        return search(rule, *paths)
    if isinstance(rule, Rule):
        return search(rule.include, *paths) and not search(rule.exclude, *paths)
    if sites is not None or not index:
        return bool(rule(paths[-1]))
    nowhere = tuple(10**9 + i for i in index)  # an index that no layer has: does the rule look at it at all?
    others = _place_index(path, nowhere, sites)
    if any(bool(rule(x)) != bool(rule(y)) for x, y in zip(paths[1:], others, strict=True)):
        raise LoraError(
            f"the rule names single layers of {path}; pass sites= to say where in the path the index stands"
        )
    return bool(rule(path))


def _place_index(path: str, index: tuple[int, ...], sites: Sites | None) -> Iterator[str]:
    """The leaf's path with the layer's index put in: where `sites` say, or in every place it could stand."""
    site, _, name = path.rpartition("/")
    if name == PROMPT:
        yield join(path, str(*index))
        return
    places: Iterable[tuple[int, ...]]
    places = itertools.combinations_with_replacement(range(1, path.count("/") + 1), len(index))
    if sites is not None:
        if site not in sites:
            raise LoraError(f"the adapter's {site!r} is not among the sites:\n{listing(sites)}")
        places = [sites[site].stack_at]
    for at in places:
        parts = path.split("/")
        # From the last to the first, so that the places that remain still count components of the path alone.
        for place, number in reversed(list(zip(at, index, strict=True))):
            parts.insert(place, str(number))
        yield "/".join(parts)


def _stack_of(adapter: Adapter, path: str) -> tuple[int, ...]:
    *above, leaf = path.split("/")
    site: Any = adapter
    for part in above:
        site = site[part]
    if leaf in PARALLEL:
        return ()
    if leaf == PROMPT:
        return tuple(site[leaf].shape[:1])
    # Where `scale` was taken away, the stack is all axes but the last two of `a` or `b`.
    return tuple(site["scale"].shape if "scale" in site else site[leaf].shape[:-2])
