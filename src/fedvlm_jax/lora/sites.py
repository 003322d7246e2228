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

_KINDS: dict[type, Kind] = {nn.Dense: "dense", nn.DenseGeneral: "dense_general", nn.Conv: "conv", nn.Embed: "embed"}


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
        return join(self.path, _weight_name(self.kind))

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


def read_site(module: nn.Module) -> Site | None:
    """Describe the weight of a module as it is inside all scans; None where no adapter can sit on the module's type."""
    kind = _KINDS.get(type(module))
    if kind is None or not module.has_variable("params", _weight_name(kind)):
        return None
    shape = module.get_variable("params", _weight_name(kind)).shape
    inputs, obstacle = len(shape) - 1, ""
    if isinstance(module, nn.DenseGeneral):
        inputs = len(as_tuple(module.axis))
        if as_tuple(module.batch_dims):
            obstacle = "DenseGeneral with batch dimensions"
    elif isinstance(module, nn.Conv) and module.feature_group_count != 1:
        obstacle = f"grouped convolution, {module.feature_group_count} groups"
    elif isinstance(module, nn.Conv) and module.mask is not None:
        obstacle = "masked convolution"
    return Site("/".join(module.path), kind, (), (), shape[:inputs], shape[inputs:], obstacle)


def find_sites(apply_fn: Callable[..., Any], params: Mapping[str, Any], *example: Any, **kwargs: Any) -> Sites:
    """Trace the model once, abstractly, and list the weights that an adapter may sit on, in the order of their paths.

    Args:
        apply_fn: a linen `Module.apply`, or any function `(variables, *args, **kwargs)` that ends in one.
        params: the `params` collection, or a whole variables dictionary; shapes (`jax.ShapeDtypeStruct`) suffice.
        *example, **kwargs: as `apply_fn` takes them (`method=`, `train=False`, …); shapes suffice.

    Raises:
        LoraError: a model or state of flax.nnx.

    >>> import jax.numpy as jnp
    >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(2)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> [(path, site.d_in, site.d_out) for path, site in find_sites(model.apply, params, x).items()]
    [('layers_0', 4, 8), ('layers_1', 8, 2)]
    """
    _refuse_nnx(apply_fn, params, *example)
    variables = as_variables(params)
    _, seen = _trace(lambda v, *args: apply_fn(v, *args, **kwargs), variables, *example)
    return seen.list_sites(variables["params"])


def trace_init(init_fn: Callable[..., Mapping[str, Any]], *args: Any) -> tuple[dict[str, Any], Sites]:
    """Trace a model's `init` once, abstractly: what it returns, as shapes, and what `find_sites` finds.

    `init_fn` returns the `params` collection, or a whole variables dictionary, and calls everything. Of its arguments
    shapes suffice, `jax.eval_shape(lambda: jax.random.key(0))` for a key.
    """
    shapes, seen = _trace(init_fn, *args)
    return shapes, seen.list_sites(as_variables(shapes)["params"])


def _refuse_nnx(*given: Any) -> None:
    # Sites are found by what linen calls on its way, which nnx never does.
    if "flax.nnx" not in sys.modules:
        return  # then nobody has a model of it, and a second of importing is saved
    from flax import nnx

    for value in given:
        if isinstance(getattr(value, "__self__", value), nnx.Module | nnx.State | nnx.GraphDef):
            raise LoraError(
                f"{type(value).__name__} is of flax.nnx, and adapters sit on modules of flax.linen: pass a linen "
                "module's apply and its params. nnx.bridge.to_linen does not help, because it hides the layers; nnx "
                "has LoRA of its own, flax.nnx.LoRA"
            )


def _trace(fn: Callable[..., Any], *args: Any) -> tuple[Any, "_Seen"]:
    """The shapes of what a function returns, and the layers that it calls."""
    leaves, structure = jax.tree.flatten(args)
    # Python flags and other static arguments stay as they are.
    dynamic = {at: leaf for at, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def call(arrays: dict[int, Any]) -> Any:
        return fn(*jax.tree.unflatten(structure, [arrays.get(at, leaf) for at, leaf in enumerate(leaves)]))

    seen = _Seen()
    with nn.intercept_methods(seen.watch):
        return jax.eval_shape(call, dynamic), seen


class _Seen:
    """The layers of a model, noted as they are called."""

    def __init__(self) -> None:
        self._sites: Sites = {}  # as they are inside all scans
        self._ranks: dict[tuple[str, str], int] = {}  # (module, parameter): its number of axes inside the module

    def watch(self, next_fun: Callable[..., Any], args: Any, kw: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kw)  # first, because in `init` that makes the parameters
        module, path = context.module, "/".join(context.module.path)
        if module.scope is not None and context.method_name in ("__call__", "attend"):
            for name, leaf in tree.flatten(module.variables.get("params", {})).items():
                self._ranks[path, join(path, name)] = len(leaf.shape)
            if site := read_site(module):
                self._sites[path] = site
        return out

    def list_sites(self, params: Mapping[str, Any]) -> Sites:
        """List all sites; `params` are as they lie outside of all scans."""
        weights, sites = tree.flatten(params), Sites()
        for path, site in sorted(self._sites.items()):
            inner, outer = (*site.inputs, *site.outputs), weights[site.weight].shape
            depth, parts, obstacle = len(outer) - len(inner), path.split("/"), site.obstacle
            if outer[depth:] != inner:
                obstacle = f"stacked along an axis that is not the first: {outer} outside its scan, {inner} inside"
            # How many leading axes the weight has lost inside each of the modules that hold it, from the model on.
            above = ("/".join(parts[:end]) for end in range(len(parts) + 1))
            lost = [len(outer) - self._ranks.get((module, site.weight), len(outer)) for module in above]
            stack_at = tuple(next(at for at, axes in enumerate(lost) if axes > axis) for axis in range(depth))
            sites[path] = dataclasses.replace(site, stack=outer[:depth], stack_at=stack_at, obstacle=obstacle)
        return sites


def select(sites: Sites, targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[Site]:
    """Select the sites whose path, with or without the weight's name, matches a target and no pattern of `exclude`.

    Raises:
        LoraError: nothing matches, or a site that matches cannot be adapted.
    """
    found = [site for site in sites.values() if search(targets, site.path, site.weight)]
    chosen = [site for site in found if not search(exclude, site.path, site.weight)]
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


def _weight_name(kind: Kind) -> str:
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


def search(patterns: str | Sequence[str], *paths: str) -> bool:
    """Tell whether a regular expression, or one of several, is found in a path; a `LoraError` where it is none.

    Raises:
        LoraError: it is no regular expression.
    """
    for pattern in as_patterns(patterns):
        try:
            if any(re.search(pattern, path) for path in paths):
                return True
        except re.error as error:
            raise LoraError(f"{pattern!r} is not a regular expression: {error}") from None
    return False


def listing(paths: Any, limit: int = 60) -> str:
    """List paths for a message, a line each."""
    lines = [f"  {path}" for path in paths]
    if len(lines) > limit:
        lines[limit:] = [f"  … and {len(lines) - limit} more"]
    return "\n".join(lines)
