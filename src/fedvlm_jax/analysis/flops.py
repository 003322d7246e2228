"""Operations of a function's matrix products and convolutions, counted in its trace, before XLA sees it.

The trace of a gradient with respect to an adapter holds no gradient of a frozen weight. Elementwise work is not
counted, as is usual.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Count a multiplication and an addition as two operations, all devices together, from shapes alone.

    Scans count as often as they turn, branches as the dearest of them, and what a backward pass recomputes again.
    Static arguments of the function are to be bound with `functools.partial`.

    Raises:
        ValueError: there is a product in a while loop, whose number of turns is not known.

    >>> count_flops(jax.numpy.matmul, jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((4, 5), "float32"))
    120
    """
    return sum(map(_count, jax.make_jaxpr(function)(*arguments).jaxpr.eqns))


def _count(equation: Any) -> int:
    params, shapes = equation.params, [variable.aval.shape for variable in equation.invars]
    made = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    values = [part for value in params.values() for part in (value if isinstance(value, list | tuple) else [value])]
    inner = [sum(map(_count, value.eqns)) for value in values if isinstance(value, ClosedJaxpr | Jaxpr)]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return 2 * made * math.prod(shapes[0][axis] for axis in contracted)
        case "conv_general_dilated":
            return 2 * made * math.prod(shapes[1]) // shapes[1][params["dimension_numbers"].rhs_spec[0]]
        case "scan":
            return params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "while" if any(inner):
            raise ValueError("a while loop's length is not known: matmuls in it cannot be counted")
        case _:
            return sum(inner)
