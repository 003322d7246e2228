"""Traffic of a program that XLA compiled."""

import jax
import jax.numpy as jnp

from fedvlm_jax.analysis.costs import count_traffic
from fedvlm_jax.analysis.hlo import parse_program


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
