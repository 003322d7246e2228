"""Bottleneck adapters in the forward pass: against NumPy, in every layer of a stack, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from linen_models import Model

from fedvlm_jax import lora
from fedvlm_jax.utils import tree

WIDTH = 3


class Stack(nn.Module):
    """Three scanned dense layers, under remat."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(4, name="fc")(x)), None

        axes = {"params": 0, "lora": 0}
        layers = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.fixture(scope="module")
def stack():
    """-> forward, params, an adapter with LoRA and bottlenecks whose leaves are all moved, an input."""
    x = jax.random.normal(jax.random.key(2), (2, 5, 4))
    params = Stack().init(jax.random.key(0), x)["params"]
    sites = lora.find_sites(Stack().apply, params, x)
    plain = lora.init(jax.random.key(1), sites, lora.LoRA(rank=2, alpha=3))
    adapter = lora.add_bottlenecks(jax.random.key(3), plain, sites, WIDTH, "fc$")
    np.testing.assert_array_equal(lora.inject(Stack().apply)(params, adapter, x), Stack().apply({"params": params}, x))
    return lora.inject(Stack().apply), params, sites, move(adapter), x


def move(adapter, scale=0.4):
    rng = np.random.default_rng(0)
    flat = tree.flatten(adapter)
    return tree.unflatten({
        path: leaf if path.endswith("scale") else leaf + scale * rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in flat.items()
    })  # fmt: skip


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def compute(params, adapter, x):
    """The stack in NumPy, layer by layer."""
    fc, site, x = params["layers"]["fc"], adapter["layers"]["fc"], np.asarray(x, float)
    for at in range(3):
        w, bias, a, b, scale, down, up = (
            np.asarray(part[name][at], float)
            for part, name in ((fc, "kernel"), (fc, "bias"), *((site, n) for n in ("a", "b", "scale", "down", "up")))
        )
        y = x @ w + bias + scale * (x @ a) @ b
        x = np.tanh(y + gelu(y @ down[:-1] + down[-1]) @ up[:-1] + up[-1])
    return x


def test_every_layer_of_a_stack_has_its_own_behind_lora(stack):
    forward, params, _, adapter, x = stack
    wanted = compute(params, adapter, x)
    np.testing.assert_allclose(forward(params, adapter, x), wanted, atol=1e-5)
    alone = tree.partition(adapter, lambda path: path.endswith(("down", "up")))[0]
    zero = {path: leaf * (not path.endswith("/a")) for path, leaf in tree.flatten(adapter).items()}
    np.testing.assert_allclose(forward(params, alone, x), forward(params, tree.unflatten(zero), x), atol=1e-6)


def test_clients_side_by_side_and_gradients(stack):
    forward, params, _, adapter, x = stack
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), adapter)
    both = jax.jit(jax.vmap(forward, in_axes=(None, 0, None)))(params, two, x)
    np.testing.assert_allclose(both[1], forward(params, jax.tree.map(lambda leaf: leaf[1], two), x), atol=1e-5)
    direction = move(jax.tree.map(jnp.zeros_like, adapter), 1.0)
    gradient = jax.grad(lambda at: forward(params, at, x).sum())(adapter)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.sum(g * d)), gradient, direction)))

    def moved(by):
        at = jax.tree.map(lambda leaf, d: np.asarray(leaf, float) + by * np.asarray(d, float), adapter, direction)
        return compute(params, at, x).sum()

    assert slope == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-4)


def test_rules_split_it_by_layer_and_dropout_leaves_it_alone(stack):
    _, _, sites, adapter, _ = stack
    shared, personal = lora.partition(adapter, r"layers/[02]/fc/(down|up)$", sites)
    assert sorted(shared["layers"]["fc"]["down"]) == ["0", "2"]
    back = lora.combine(shared, personal)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    alone = tree.partition(adapter, lambda path: path.endswith(("down", "up")))[0]
    jax.tree.map(np.testing.assert_array_equal, lora.with_dropout(jax.random.key(0), alone, 0.5), alone)


def test_it_is_no_matrix(stack):
    with pytest.raises(lora.LoraError, match="has a bottleneck: its nonlinearity is no matrix"):
        dict(lora.sites_of(stack[3]))


def test_what_does_not_fit_is_said(stack, params, example):
    forward, weights, sites, adapter, x = stack
    with pytest.raises(lora.LoraError, match="no site matches targets"):
        lora.add_bottlenecks(jax.random.key(0), {}, sites, WIDTH, "fc9$")
    others = lora.find_sites(Model().apply, params, *example)
    with pytest.raises(lora.LoraError, match="cannot come after embed/embedding"):
        lora.add_bottlenecks(jax.random.key(0), {}, others, WIDTH, "embed$")
    site = adapter["layers"]["fc"]
    with pytest.raises(lora.LoraError, match=r"needs an nn\.Dense, and 'down' and 'up'"):
        forward(weights, {"layers": {"fc": {"down": site["down"]}}}, x)
    with pytest.raises(lora.LoraError, match=r"fc/up has shape \(3, 4\), expected \(4, 4\)"):
        forward(weights, {"layers": {"fc": {**site, "up": site["up"][:, 1:]}}}, x)
    with pytest.raises(lora.LoraError, match="never read"):
        forward(weights, {"layers": {"fc": site, "other": {"down": site["down"]}}}, x)
