"""Operations of a function's matrix products and convolutions, counted in its trace, before XLA sees it.

Of a gradient with respect to an adapter, with the base an argument that is not differentiated, the trace holds the
forward pass, the gradients of activations and those of the adapter's factors: no gradient of a frozen weight, and
nothing twice unless layers are rematerialised. Elementwise work (norms, softmax, depthwise convolutions written as
sums) is not counted, as is usual. Layers are scanned, so the gradient of the first layer's input is in the count,
although nobody needs it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

__all__ = ["count_flops"]


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the operations of all matrix products and convolutions in `function`; nothing is computed.

    A multiplication and an addition are two operations. Scans count as often as they turn, branches as the dearest of
    them, and what a backward pass recomputes counts again. All devices together.

    Args:
        function: traceable; bind static arguments with `functools.partial`.
        arguments: arrays or their shapes.

    Raises:
        ValueError: there is a product in a while loop, whose number of turns is not known.

    >>> count_flops(jax.numpy.matmul, jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((4, 5), "float32"))
    120
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    params: Mapping[str, Any] = equation.params
    inner = [_count(jaxpr) for jaxpr in _find_inner(params)]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel, feature = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[feature]
        case "scan":
            return params["length"] * sum(inner)
        case "cond":
            return max(inner, default=0)
        case "while" if any(inner):
            raise ValueError("a while loop's length is not known: matmuls in it cannot be counted")
        case _:
            return sum(inner)


def _find_inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
