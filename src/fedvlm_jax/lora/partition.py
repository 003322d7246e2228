"""Rules: which leaves of an adapter leave the client, which stay, which are trained."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedvlm_jax.lora.adapter import FACTORS, Adapter
from fedvlm_jax.lora.sites import LoraError, Sites, as_patterns, listing, search
from fedvlm_jax.utils import tree


@dataclasses.dataclass(frozen=True)
class Rule:
    """Names leaves of an adapter: those that one of `include` is found in and none of `exclude`.

    Regular expressions are searched in the leaves' paths, `decoder/layers/fc1/b`, and for stacked layers in their
    virtual paths, `decoder/layers/3/fc1/b`. An empty `include` is the one rule that may match nothing.

    Examples:
        >>> adapter = {"fc": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.ones(())}}
        >>> shared, personal = partition(adapter, Rule(r"fc/(a|b)$", exclude="a$"))
        >>> list(shared["fc"]), list(personal["fc"])
        (['b'], ['a', 'scale'])
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

    Examples:
        >>> adapter = {"fc": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.ones(())}}
        >>> shared, personal = partition(adapter, r"/b$")
        >>> list(shared["fc"]), list(personal["fc"])
        (['b'], ['a', 'scale'])
    """
    shared: dict[str, Any] = {}
    personal: dict[str, Any] = {}
    for path, leaf in tree.flatten(adapter).items():
        stack = _stack_of(adapter, path)
        mine = {index: _decide(rule, path, index, sites) for index in np.ndindex(*stack)}
        if all(mine.values()) or not any(mine.values()):
            (shared if any(mine.values()) else personal)[path] = leaf
            continue
        for index, named in mine.items():
            (shared if named else personal)[f"{path}/{'.'.join(map(str, index))}"] = leaf[index]
    if not shared and not (isinstance(rule, Rule) and not as_patterns(rule.include)):
        paths = [v for path in tree.flatten(adapter) for v in virtual_paths(adapter, path, sites)]
        raise LoraError(f"the rule {rule!r} matches no leaf of the adapter; there are:\n{listing(paths)}")
    return tree.unflatten(shared), tree.unflatten(personal)


def combine(shared: Adapter, personal: Adapter) -> Adapter:
    """Undo `partition`: join two trees of disjoint leaves and stack split layers again.

    Raises:
        LoraError: both trees hold a leaf, or layers of a stack are missing.

    Examples:
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
        if head.rpartition("/")[2] in FACTORS and re.fullmatch(r"\d+(\.\d+)*", last):
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
    """All paths that a leaf answers to: one per layer where it is stacked and `sites` are known, else its own."""
    stack = _stack_of(adapter, path)
    if not stack or sites is None:
        return [path]
    return [next(_places(path, index, sites)) for index in np.ndindex(*stack)]


def _decide(rule: str | Rule | Callable[[str], bool], path: str, index: tuple[int, ...], sites: Sites | None) -> bool:
    names = [path, *_places(path, index, sites)] if index else [path]
    if isinstance(rule, str):
        rule = Rule(rule)
    if isinstance(rule, Rule):
        included = any(search(p, name) for p in as_patterns(rule.include) for name in names)
        return included and not any(search(p, name) for p in as_patterns(rule.exclude) for name in names)
    if sites is not None or not index:
        return bool(rule(names[-1]))
    nowhere = tuple(10**9 + i for i in index)  # an index that no layer has: does the rule look at it at all?
    if any(bool(rule(x)) != bool(rule(y)) for x, y in zip(names[1:], _places(path, nowhere, sites), strict=True)):
        raise LoraError(
            f"the rule names single layers of {path}; pass sites= to say where in the path the index stands"
        )
    return bool(rule(path))


def _places(path: str, index: tuple[int, ...], sites: Sites | None) -> Iterator[str]:
    """The leaf's path with the layer's index put in: where `sites` say, or in every place it could stand."""
    *parts, leaf = path.split("/")
    if sites is not None and "/".join(parts) not in sites:
        raise LoraError(f"the adapter's {'/'.join(parts)!r} is not among the sites:\n{listing(sites)}")
    known = [sites["/".join(parts)].stack_at] if sites is not None else None
    for at in known or itertools.combinations_with_replacement(range(1, len(parts) + 1), len(index)):
        out: list[str] = []
        for position in range(len(parts) + 1):
            out += [str(i) for i, where in zip(index, at, strict=True) if where == position]
            out += parts[position : position + 1]
        yield "/".join([*out, leaf])


def _stack_of(adapter: Adapter, path: str) -> tuple[int, ...]:
    node: Any = adapter
    *parts, leaf = path.split("/")
    for part in parts:
        node = node[part]
    scale = node.get("scale")
    if scale is not None:
        return tuple(scale.shape)
    return tuple(node[leaf].shape[:-2])  # an adapter of which a part was taken away
