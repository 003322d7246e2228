"""Operations counted in a trace, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from harness.ours import count_round_flops
from harness.world import Settings, Shape
from toy import LABELS, SPEC, VOCABULARY, WIDTH, make_toy

from fedvlm_jax import lora
from fedvlm_jax.analysis.flops import count_flops
from fedvlm_jax.utils import tree

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
def test_loops_branches_and_what_is_computed_again(function, arguments, expected):
    assert count_flops(jax.jit(function), *arguments) == expected


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_of_all_kinds():
    assert count_flops(jnp.matmul, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5
    assert count_flops(lambda a, b: jnp.einsum("nhtd,nhsd->nhts", a, b), shape(2, 3, 4, 5), shape(2, 3, 6, 5)) == (
        2 * 2 * 3 * 4 * 6 * 5
    )
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count_flops(convolve, shape(1, 8, 8, 3), shape(3, 3, 3, 7)) == 2 * (4 * 4 * 7) * (3 * 3 * 3)
    assert count_flops(lambda x: x + jnp.tanh(x), shape(9)) == 0


def test_loops_and_calls_are_entered():
    step = lambda carry, w: (carry @ w, None)  # noqa: E731
    many = lambda x, ws: jax.lax.scan(jax.jit(step), x, ws)[0]  # noqa: E731
    assert count_flops(many, shape(3, 4), shape(7, 4, 4)) == 7 * 2 * 3 * 4 * 4
    assert count_flops(jax.vmap(jnp.matmul), shape(5, 3, 4), shape(5, 4, 2)) == 5 * 2 * 3 * 4 * 2
    branches = lambda n, x: jax.lax.cond(n > 0, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert count_flops(branches, jax.ShapeDtypeStruct((), jnp.int32), shape(3, 3)) == 2 * 27
    with pytest.raises(ValueError, match="length is not known"):
        count_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), shape(3, 3))


def test_a_round_of_the_toy_by_hand():
    """fc1 6 -> 8, fc2 8 -> 15, rank 2, two examples a step; no gradient of a base weight, none of the input."""
    vlm, params = make_toy()
    vlm.shapes = lambda: jax.eval_shape(lambda: params)
    rows, rank, out = 2, SPEC.rank, LABELS * VOCABULARY
    base = WIDTH * 8 + 8 * out
    low = WIDTH * rank + rank * 8 + 8 * rank + rank * out
    forward = base + low
    # Of fc1: gradients of a, b and what lies between; of fc2 the same, and of its input through base and adapter.
    fc1 = WIDTH * rank + 2 * rank * 8
    fc2 = 2 * 8 * rank + 2 * rank * out + 8 * out
    batch = {"image_features": shape(rows, WIDTH), "labels": jax.ShapeDtypeStruct((rows, LABELS), jnp.int32)}
    settings = Settings(rank=rank, targets=SPEC.targets)
    found = count_round_flops(vlm, Shape(clients=3, steps=4, batch=rows), settings, batch)
    assert found == 3 * 4 * 2 * rows * (forward + fc1 + fc2)


def test_the_toy_s_adapter_is_what_is_counted():
    vlm, _ = make_toy()
    paths = [path for path in tree.flatten(lora.init(jax.random.key(0), vlm.sites, SPEC)) if path.endswith("/a")]
    assert len(paths) == 2
