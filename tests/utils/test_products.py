"""Products with gradients of their own: equal to the plain ones in every derivative, and of another form on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.analysis.flops import count_flops
from fedvlm_jax.utils.products import mix, project, score

PLAIN = {
    "project": (project, lambda left, right: left @ right, (12, 5), (5, 7)),
    "score": (score, lambda left, right: left @ right.swapaxes(-1, -2), (12, 5), (9, 5)),
    "mix": (mix, lambda left, right: left @ right, (12, 9), (9, 5)),
}


@pytest.fixture(params=PLAIN)
def case(request):
    return PLAIN[request.param]


def draw(case, leading, dtype=jnp.float32):
    left, right = jax.random.split(jax.random.key(3))
    return jax.random.normal(left, (*leading, *case[2]), dtype), jax.random.normal(right, (*leading, *case[3]), dtype)


def loss_of(multiply):
    return lambda left, right: jnp.sum(jnp.sin(multiply(left, right)))


def assert_close(found, expected, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-5), found, expected)


@pytest.mark.broad
@pytest.mark.parametrize("leading", [(), (3,), (1, 4), (1, 1), (2, 1, 3)], ids=str)
def test_values_and_gradients_are_those_of_the_plain_product(case, leading):
    multiply, plain, *_ = case
    factors = draw(case, leading)
    np.testing.assert_array_equal(multiply(*factors), plain(*factors))
    assert_close(jax.grad(loss_of(multiply), (0, 1))(*factors), jax.grad(loss_of(plain), (0, 1))(*factors))


@pytest.mark.broad
@pytest.mark.parametrize(
    "derive",
    [
        lambda loss, *factors: jax.jvp(loss, factors, factors),
        lambda loss, *factors: jax.jvp(jax.grad(loss, (0, 1)), factors, factors),
        lambda loss, *factors: jax.grad(lambda *x: jnp.vdot(jax.grad(loss)(*x), x[0]), (0, 1))(*factors),
        lambda loss, *factors: jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(*factors),
        lambda loss, *factors: jax.vmap(jax.grad(loss, (0, 1)), (0, None))(factors[0], factors[1][0]),
        lambda loss, *factors: jax.grad(jax.checkpoint(loss), (0, 1))(*factors),
        lambda loss, *factors: jax.grad(lambda *x: jax.lax.scan(lambda s, y: (s + loss(*y), None), 0.0, x)[0])(
            *factors
        ),
    ],
    ids=["jvp", "jvp of grad", "grad of grad", "vmap", "vmap over left", "checkpoint", "scan"],
)
def test_other_derivatives_too(case, derive):
    multiply, plain, *_ = case
    factors = draw(case, (3, 1))
    assert_close(derive(loss_of(multiply), *factors), derive(loss_of(plain), *factors), rtol=1e-4)


@pytest.mark.parametrize("place", [0, 1], ids=["left", "right"])
def test_a_frozen_factor_costs_nothing(case, place):
    multiply, plain, *_ = case
    factors = draw(case, (2,))
    gradient = jax.grad(loss_of(multiply), place)
    assert count_flops(gradient, *factors) == 2 * count_flops(plain, *factors)  # the product, and one gradient


def test_narrow_types_keep_their_dtypes_and_scores_are_float32(case):
    multiply, plain, *_ = case
    factors = draw(case, (2,), jnp.bfloat16)
    out = multiply(*factors)
    assert out.dtype == (jnp.float32 if multiply is score else jnp.bfloat16)
    gradients = jax.grad(lambda *x: multiply(*x).astype(jnp.float32).sum(), (0, 1))(*factors)
    expected = jax.grad(lambda *x: plain(*x).sum(), (0, 1))(*(x.astype(jnp.float32) for x in factors))
    assert {one.dtype for one in gradients} == {jnp.dtype(jnp.bfloat16)}
    assert_close([one.astype(jnp.float32) for one in gradients], list(expected), rtol=2e-2)


def find_sums_over_rows(text):
    """Left factors of a compiled program's products of batches that sum over the left factor's rows."""
    shapes = {name: shape.count(",") + 1 for name, shape in re.findall(r"%([\w.-]+) = f32\[([\d,]+)\]", text)}
    pattern = r" dot\(%([\w.-]+), .*lhs_batch_dims.*lhs_contracting_dims=\{(\d+)\}"
    return [left for left, axis in re.findall(pattern, text) if int(axis) != shapes[left] - 1]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs the CPU, of which this is a property")
@pytest.mark.parametrize("examples", [1, 8])
def test_no_gradient_of_a_vmapped_product_on_a_cpu_sums_over_rows(case, examples):
    """As attention calls them: heads are split off just before."""
    multiply, plain, *_ = case
    left, right = (jnp.stack([join_heads(x)] * 2) for x in draw(case, (examples, 4)))

    def compile_gradients(multiply):
        gradients = jax.grad(lambda left, right: loss_of(multiply)(split_heads(left), split_heads(right)), (0, 1))
        return jax.jit(jax.vmap(gradients)).lower(left, right).compile().as_text()

    assert find_sums_over_rows(compile_gradients(plain))
    assert not find_sums_over_rows(compile_gradients(multiply))


def split_heads(x):
    return x.reshape(*x.shape[:-1], 4, -1).swapaxes(-3, -2)


def join_heads(x):
    return x.swapaxes(-3, -2).reshape(*x.shape[:-3], x.shape[-2], -1)


@pytest.mark.parametrize("name", ["score", "mix"])
def test_attention_is_turned_on_a_cpu_and_the_plain_one_on_accelerators(name):
    traced = jax.jit(jax.grad(loss_of(PLAIN[name][0]), (0, 1))).trace(*draw(PLAIN[name], (2,)))
    texts = {where: traced.lower(lowering_platforms=(where,)).as_text() for where in ("cpu", "tpu", "cuda")}
    turned = {where: "optimization_barrier" in text for where, text in texts.items()}
    assert turned == {"cpu": True, "tpu": False, "cuda": False}
