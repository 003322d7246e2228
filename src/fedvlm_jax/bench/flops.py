"""The arithmetic that a function asks for: its matmuls and convolutions, counted in its trace, before XLA sees it.

Of a gradient with respect to an adapter, with the base an argument that is not differentiated, the trace holds exactly
the forward pass, the gradients of activations and those of the adapter's factors: no gradient of a frozen weight, and
nothing twice unless layers are rematerialised. One product and one sum are two operations. Elementwise work (norms,
softmax, the vision tower's depthwise convolutions) is not counted, as is usual. Layers are scanned, so the gradient of
the first layer's input is in the count, although nobody needs it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

__all__ = ["count_flops"]


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of the matmuls and convolutions in `function`, whose result is used whole; nothing is computed.

    Args:
        function: traceable; its loops are scans, whose length is known.
        arguments: arrays or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, feature = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[feature]
    inner = [_count(jaxpr) for jaxpr in _find_inner(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("a while loop's length is not known: matmuls in it cannot be counted")
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _find_inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one
