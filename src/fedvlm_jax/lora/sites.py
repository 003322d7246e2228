"""Sites: the weights of a linen model that a low-rank adapter may sit on, found by tracing it once."""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from flax import linen as nn

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils import tree

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
        return join(self.path, weight_name(self.kind))

    @property
    def d_in(self) -> int:
        """Rows of `a`."""
        return math.prod(self.inputs)

    @property
    def d_out(self) -> int:
        """Columns of `b`."""
        return math.prod(self.outputs)

    def __str__(self) -> str:
        stack = f"{list(self.stack)} × " if self.stack else ""
        obstacle = f"  (cannot be adapted: {self.obstacle})" if self.obstacle else ""
        return f"{self.weight}  {self.kind}  {stack}{self.d_in} → {self.d_out}{obstacle}"


Sites = dict[str, Site]


def find_sites(apply_fn: Callable[..., Any], params: Mapping[str, Any], *example: Any, **kwargs: Any) -> Sites:
    """Trace the model once, abstractly, and list the weights that an adapter may sit on, in the order of their paths.

    Args:
        apply_fn: a linen `Module.apply`, or any function `(variables, *args, **kwargs)` that ends in one.
        params: the `params` collection, or a whole variables dictionary; shapes (`jax.ShapeDtypeStruct`) suffice.
        *example: arguments as `apply_fn` takes them; shapes suffice. Nothing is computed.
        **kwargs: passed on (`method=`, `train=False`, …).

    Raises:
        LoraError: a model or state of flax.nnx.

    Examples:
        >>> from flax import linen as nn
        >>> import jax.numpy as jnp
        >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(2)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> [(path, site.d_in, site.d_out) for path, site in find_sites(model.apply, params, x).items()]
        [('layers_0', 4, 8), ('layers_1', 8, 2)]
    """
    _refuse_nnx(apply_fn, params, *example)
    variables = as_variables(params)
    seen = _Seen()
    with nn.intercept_methods(seen.watch):
        _eval_shape(lambda v, *args: apply_fn(v, *args, **kwargs), variables, *example)
    return seen.sites(variables["params"])


def trace_init(init_fn: Callable[..., Mapping[str, Any]], *args: Any) -> tuple[dict[str, Any], Sites]:
    """Trace a model's `init` once, abstractly: what it returns, as shapes, and what `find_sites` finds.

    Args:
        init_fn: (*args) -> the `params` collection, or a whole variables dictionary; it calls everything.
        *args: as it takes them; shapes suffice, `jax.eval_shape(lambda: jax.random.key(0))` for a key.
    """
    seen = _Seen()
    with nn.intercept_methods(seen.watch):
        shapes = _eval_shape(init_fn, *args)
    return shapes, seen.sites(as_variables(shapes)["params"])


def _refuse_nnx(*given: Any) -> None:
    """Sites are found by what linen calls on its way, which nnx never does."""
    if "flax.nnx" not in sys.modules:
        return  # then nobody has a model of it, and a second of importing is saved
    from flax import nnx

    for one in given:
        if isinstance(one, nnx.Module | nnx.State | nnx.GraphDef) or isinstance(
            getattr(one, "__self__", None), nnx.Module
        ):
            raise LoraError(
                f"{type(one).__name__} is of flax.nnx, and adapters sit on modules of flax.linen: pass a linen "
                "module's apply and its params. nnx.bridge.to_linen does not help, because it hides the layers; nnx "
                "has LoRA of its own, flax.nnx.LoRA"
            )


class _Seen:
    """What the layers of a model are and hold, noted as they are called."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[Kind, tuple[int, ...], int, str]] = {}  # kind, weight's shape, inputs, obstacle
        self._inside: dict[tuple[str, ...], dict[str, int]] = {}  # module's path → parameter below it → axes inside

    def watch(self, next_fun: Callable[..., Any], args: Any, kw: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kw)  # first, because in `init` that makes the parameters
        module = context.module
        if module.scope is None or context.method_name not in ("__call__", "attend"):
            return out
        held = tree.flatten(module.variables.get("params", {}))
        self._inside[module.path] = {name: len(leaf.shape) for name, leaf in held.items()}
        kind = KINDS.get(type(module))
        if kind is not None and module.has_variable("params", weight_name(kind)):
            shape = module.get_variable("params", weight_name(kind)).shape
            self._kinds["/".join(module.path)] = (kind, shape, count_inputs(module, shape), find_obstacle(module))
        return out

    def sites(self, params: Mapping[str, Any]) -> Sites:
        """All, where these are the parameters outside of all scans."""
        weights = tree.flatten(params)
        lost: dict[tuple[str, ...], int] = {}  # module's path → how many leading axes its parameters lost on the way in
        for path, held in self._inside.items():
            outer = {name: weights.get("/".join((*path, name))) for name in held}
            losses = [len(leaf.shape) - held[name] for name, leaf in outer.items() if leaf is not None]
            if losses:
                lost[path] = max(losses)
        sites: Sites = {}
        for path, (kind, shape, inputs, obstacle) in sorted(self._kinds.items()):
            outer = weights[join(path, weight_name(kind))].shape
            depth, parts = len(outer) - len(shape), tuple(path.split("/"))
            if outer[depth:] != shape:
                obstacle = f"stacked along an axis that is not the first: {outer} outside its scan, {shape} inside"
            stack_at = tuple(
                next(end for end in range(len(parts) + 1) if lost.get(parts[:end], 0) > axis) for axis in range(depth)
            )
            sites[path] = Site(path, kind, outer[:depth], stack_at, shape[:inputs], shape[inputs:], obstacle)
        return sites


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
    dynamic = {at: leaf for at, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def call(arrays: dict[int, Any]) -> Any:
        return fn(*jax.tree.unflatten(structure, [arrays.get(at, leaf) for at, leaf in enumerate(leaves)]))

    return jax.eval_shape(call, dynamic)


def weight_name(kind: Kind) -> str:
    """Name the adapted parameter of a layer."""
    return "embedding" if kind == "embed" else "kernel"


def join(path: str, name: str) -> str:
    """Append a name to a path, which may be empty."""
    return f"{path}/{name}" if path else name


def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number, or several, as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return one pattern, or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def search(pattern: str, path: str) -> bool:
    """Tell whether a regular expression is found in a path.

    Raises:
        LoraError: it is no regular expression.
    """
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise LoraError(f"{pattern!r} is not a regular expression: {error}") from None


def listing(paths: Any, limit: int = 60) -> str:
    """List paths for a message, a line each."""
    lines = [f"  {path}" for path in paths]
    more = len(lines) - limit
    return "\n".join(lines[:limit] + ([f"  … and {more} more"] if more > 0 else []))
