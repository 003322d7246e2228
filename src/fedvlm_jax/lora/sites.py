"""Sites: the weights of a linen model that a low-rank adapter may sit on, found by tracing it once."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from flax import linen as nn

from fedvlm_jax import tree
from fedvlm_jax.errors import UserError

Kind = Literal["dense", "dense_general", "conv", "embed"]

KINDS: dict[type, Kind] = {nn.Dense: "dense", nn.DenseGeneral: "dense_general", nn.Conv: "conv", nn.Embed: "embed"}


class LoraError(UserError):
    """An adapter, a target or a rule does not fit the model; the message lists what there is."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight that can be adapted.

    Attributes:
        path: the module's path in the parameter tree, `decoder/layers/fc1`.
        kind: what the module is.
        stack: sizes of the leading axes that scans or vmaps put on the weight, outermost first.
        stack_at: for each of them, how many components of `path` stand before its index: with `stack_at == (2,)` layer
            3 of `decoder/layers/fc1` has the virtual path `decoder/layers/3/fc1`.
        inputs: the weight's input axes (a convolution's window included); the vocabulary for an embedding.
        outputs: the weight's output axes.
        obstacle: why this site cannot be adapted (a grouped convolution, say); empty where it can.
    """

    path: str
    kind: Kind
    stack: tuple[int, ...]
    stack_at: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    obstacle: str = ""

    @property
    def weight(self) -> str:
        """Path of the adapted parameter."""
        return f"{self.path}/{weight_name(self.kind)}".removeprefix("/")

    @property
    def d_in(self) -> int:
        return math.prod(self.inputs)

    @property
    def d_out(self) -> int:
        return math.prod(self.outputs)

    def __str__(self) -> str:
        stack = f"{list(self.stack)} × " if self.stack else ""
        obstacle = f"  (cannot be adapted: {self.obstacle})" if self.obstacle else ""
        return f"{self.weight}  {self.kind}  {stack}{self.d_in} → {self.d_out}{obstacle}"


Sites = dict[str, Site]


def find_sites(apply_fn: Callable[..., Any], params: Mapping[str, Any], *example: Any, **kwargs: Any) -> Sites:
    """Trace the model once, abstractly, and list the weights that an adapter may sit on.

    Args:
        apply_fn: a linen `Module.apply`, or any function `(variables, *args, **kwargs)` that ends in one.
        params: the `params` collection, or a whole variables dictionary; shapes (`jax.ShapeDtypeStruct`) suffice.
        *example: arguments as `apply_fn` takes them; shapes suffice. Nothing is computed.
        **kwargs: passed on (`method=`, `train=False`, …).

    Returns:
        path → `Site`, in the order of the paths.
    """
    variables = as_variables(params)
    weights = tree.flatten(variables["params"])
    lost: dict[tuple[str, ...], int] = {}  # module path → how many leading axes its parameters have lost on the way in
    found: dict[str, tuple[Kind, tuple[int, ...], int, str]] = {}  # kind, shape inside, number of input axes, obstacle

    def watch(next_fun: Callable[..., Any], args: Any, kw: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.scope is not None and context.method_name in ("__call__", "attend"):
            path = module.path
            for name, leaf in tree.flatten(module.variables.get("params", {})).items():
                outer = weights.get("/".join((*path, name)))
                if outer is not None:
                    lost[path] = max(lost.get(path, 0), len(outer.shape) - len(leaf.shape))
            kind = KINDS.get(type(module))
            if kind is not None and module.has_variable("params", weight_name(kind)):
                shape = module.get_variable("params", weight_name(kind)).shape
                found["/".join(path)] = (kind, shape, count_inputs(module, shape), find_obstacle(module))
        return next_fun(*args, **kw)

    with nn.intercept_methods(watch):
        _eval_shape(lambda v, *args: apply_fn(v, *args, **kwargs), variables, *example)
    return {path: _site(path, *found[path], weights, lost) for path in sorted(found)}


def _site(
    path: str,
    kind: Kind,
    shape: tuple[int, ...],
    inputs: int,
    obstacle: str,
    weights: Mapping[str, Any],
    lost: Mapping[tuple[str, ...], int],
) -> Site:
    outer = weights[f"{path}/{weight_name(kind)}".removeprefix("/")].shape
    depth = len(outer) - len(shape)
    if outer[depth:] != shape:
        obstacle = f"stacked along an axis that is not the first: {outer} outside its scan, {shape} inside"
    parts = tuple(path.split("/"))
    stack_at = tuple(
        next(end for end in range(len(parts) + 1) if lost.get(parts[:end], 0) > axis) for axis in range(depth)
    )
    return Site(path, kind, outer[:depth], stack_at, shape[:inputs], shape[inputs:], obstacle)


def count_inputs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """How many of a weight's leading axes are inputs; the others are outputs."""
    if isinstance(module, nn.DenseGeneral):
        return len(as_tuple(module.axis))
    return 1 if isinstance(module, nn.Embed) else len(shape) - 1


def find_obstacle(module: nn.Module) -> str:
    """Why a module of a known kind cannot be adapted all the same; empty where it can."""
    if isinstance(module, nn.Conv) and module.feature_group_count != 1:
        return f"grouped convolution, {module.feature_group_count} groups"
    if isinstance(module, nn.Conv) and module.mask is not None:
        return "masked convolution"
    if isinstance(module, nn.DenseGeneral) and as_tuple(module.batch_dims):
        return "DenseGeneral with batch dimensions"
    return ""


def select(sites: Sites, targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[Site]:
    """The sites whose path, with or without the weight's name, one of `targets` is found in and none of `exclude`.

    Raises:
        LoraError: nothing matches, or a site that matches cannot be adapted.
    """

    def matches(site: Site, patterns: str | Sequence[str]) -> bool:
        return any(search(p, site.path) or search(p, site.weight) for p in as_patterns(patterns))

    chosen = [site for site in sites.values() if matches(site, targets) and not matches(site, exclude)]
    if not chosen:
        raise LoraError(
            f"no site matches targets {as_patterns(targets)!r}" + (f" without {exclude!r}" if exclude else "") + ". "
            f"Regular expressions are searched in these paths:\n{listing(map(str, sites.values()))}"
        )
    refused = [site for site in chosen if site.obstacle]
    if refused:
        raise LoraError(f"these targets cannot be adapted; leave them out with exclude=:\n{listing(map(str, refused))}")
    return chosen


def as_variables(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Accept a bare `params` collection as well as a variables dictionary, which may carry batch statistics."""
    has_collections = "params" in params and isinstance(params["params"], Mapping)
    return params if has_collections else {"params": params}


def _eval_shape(fn: Callable[..., Any], *args: Any) -> Any:
    """`jax.eval_shape` that leaves Python flags and other static arguments alone."""
    leaves, structure = jax.tree.flatten(args)
    dynamic = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(arrays: list[Any]) -> Any:
        arrays = iter(arrays)  # type: ignore[assignment]
        full = [next(arrays) if d else leaf for d, leaf in zip(dynamic, leaves, strict=True)]  # type: ignore[call-overload]
        return fn(*jax.tree.unflatten(structure, full))

    return jax.eval_shape(call, [leaf for d, leaf in zip(dynamic, leaves, strict=True) if d])


def weight_name(kind: Kind) -> str:
    return "embedding" if kind == "embed" else "kernel"


def join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def search(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise LoraError(f"{pattern!r} is not a regular expression: {error}") from None


def listing(paths: Any, limit: int = 60) -> str:
    lines = [f"  {path}" for path in paths]
    more = len(lines) - limit
    return "\n".join(lines[:limit] + ([f"  … and {more} more"] if more > 0 else []))
