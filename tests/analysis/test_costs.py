"""Arithmetic counted in traced programs, against counts by hand; traffic of a program that XLA compiled."""

import jax
import jax.numpy as jnp
import pytest

from fedvlm_jax.analysis.costs import count_traffic, trace_flops
from fedvlm_jax.analysis.hlo import parse_program

X, W = jnp.zeros((6, 8)), jnp.zeros((8, 8))
PRODUCT = 2 * 6 * 8 * 8


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0].sum()


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (lambda x, w: x @ w, (X, W), PRODUCT),
        (lambda x, w: jax.vmap(lambda x: x @ w)(x), (jnp.zeros((3, 6, 8)), W), 3 * PRODUCT),
        (scanned, (X, W), 5 * PRODUCT),
        (jax.grad(scanned), (X, W), 5 * 2 * PRODUCT),  # with respect to x alone: one product back for each forward
        (jax.grad(jax.checkpoint(scanned)), (X, W), 5 * 2 * PRODUCT + 5 * PRODUCT),  # and forward once more
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), (X, W), 2 * PRODUCT),
        (
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
            ),
            (jnp.zeros((2, 5, 5, 4)), jnp.zeros((3, 3, 2, 6))),
            2 * (2 * 3 * 3 * 6) * (3 * 3 * 2),
        ),
    ],
)
def test_arithmetic(function, arguments, expected):
    assert trace_flops(jax.jit(function), *arguments) == expected


def test_traffic_of_slices_is_that_of_the_slices():
    """Each of 10 turns reads one of 10 matrices [64, 64] and the vector: the matrices are read once, not 10 times."""
    matrices = jax.ShapeDtypeStruct((10, 64, 64), jnp.float32)
    vector = jax.ShapeDtypeStruct((64,), jnp.float32)

    def work(matrices, vector):
        return jax.lax.scan(lambda x, w: (jnp.tanh((w * x).sum(axis=1)), None), vector, matrices)[0]

    program = parse_program(jax.jit(work).lower(matrices, vector).compile().as_text())
    once = 10 * 64 * 64 * 4
    assert program.unknown == ()
    assert once <= count_traffic(program).bytes < 5 * once
