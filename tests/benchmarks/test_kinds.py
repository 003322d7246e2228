"""Kinds of operations, told of a program whose operations are known."""

import jax
import jax.numpy as jnp
import pytest
from harness.kinds import KINDS, find_kinds, measure_kinds

TEXT = """
HloModule example

%inside (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %grown = f32[4]{0} exponential(%x)
}

%turned (y: f32[4,2]) -> f32[2,4] {
  %y = f32[4,2]{1,0} parameter(0)
  ROOT %moved = f32[2,4]{1,0} transpose(%y), dimensions={1,0}
}

ENTRY %main (p: f32[4], q: f32[4,2]) -> f32[2] {
  %p = f32[4]{0} parameter(0)
  %q = f32[4,2]{1,0} parameter(1)
  %soft = f32[4]{0} fusion(%p), kind=kLoop, calls=%inside
  %round = f32[4]{0} call(%soft), to_apply=%inside
  %flip = f32[2,4]{1,0} fusion(%q), kind=kLoop, calls=%turned
  %twice = f32[4]{0} add(%round, %p)
  %outer = f32[2]{0} custom-call(%flip, %twice), custom_call_target="__onednn$matmul"
  ROOT %product = f32[2]{0} dot(%flip, %twice), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_an_operation_is_what_is_in_it():
    kinds = find_kinds(TEXT)
    products, dear, sums, moves = KINDS
    expected = {
        "soft": dear, "round": dear, "flip": moves, "twice": sums, "outer": products, "product": products,
    }  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected


@pytest.mark.broad
@pytest.mark.parametrize(
    ("function", "most"),
    [(lambda x: x @ x @ x @ x, 0), (lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.exp(jnp.sin(y)), x), 1)],
)
def test_time_is_of_the_kind_that_was_run(function, most):
    x = jnp.ones((512, 512)) / 512
    compiled = jax.jit(function).lower(x).compile()
    jax.block_until_ready(compiled(x))
    found = measure_kinds(lambda: jax.block_until_ready(compiled(x)), compiled.as_text())
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.__getitem__) == KINDS[most]
