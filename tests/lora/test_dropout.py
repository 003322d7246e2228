"""Dropout on an adapter's input path, held against PEFT's `lora_dropout`: what it means, its statistics, its keys."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from linen_models import Model

from fedvlm_jax import lora
from fedvlm_jax.utils import tree

ROWS, WIDTH, OUT = 4000, 6, 6
KEY = jax.random.key(4)


def fill(adapter):
    """The adapter with a B that is not zero."""
    return tree.unflatten({
        path: jax.random.normal(jax.random.key(n), leaf.shape) if path.endswith("/b") else leaf
        for n, (path, leaf) in enumerate(tree.flatten(adapter).items())
    })  # fmt: skip


@pytest.fixture(scope="module")
def dense():
    """A dense layer whose base is zero and whose A and B are the identity: what comes out is what entered A."""
    params = {"kernel": jnp.zeros((WIDTH, OUT)), "bias": jnp.zeros(OUT)}
    adapter = {"a": jnp.eye(WIDTH), "b": jnp.eye(WIDTH, OUT), "scale": jnp.float32(1)}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(OUT, name="fc")(x)

    return lora.inject(Net().apply), {"fc": params}, {"fc": adapter}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_numbers_are_dropped_at_the_rate_and_the_others_divided(dense, rate):
    """By moments, over 24,000 numbers: independent of each other along rows and columns."""
    forward, params, adapter = dense
    x = jnp.ones((ROWS, WIDTH))
    dropped = np.asarray(forward(params, lora.with_dropout(KEY, adapter, rate), x))
    assert set(np.unique(dropped.round(5))) == {0.0, np.float32(1 / (1 - rate)).round(5)}
    kept = dropped > 0
    error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * error
    assert abs(dropped.mean() - 1) < 4 * error / (1 - rate), "its mean is that of the input"
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.04


def test_the_base_sees_what_is_not_dropped(dense):
    forward, params, adapter = dense
    params = {"fc": {"kernel": jnp.eye(WIDTH, OUT), "bias": jnp.zeros(OUT)}}
    x = jax.random.normal(KEY, (50, WIDTH))
    low = np.asarray(forward(params, lora.with_dropout(KEY, adapter, 0.5), x) - x)
    np.testing.assert_allclose(np.where(low == 0, 0, low / 2), np.where(low == 0, 0, x), atol=1e-6)
    assert 0.3 < (low == 0).mean() < 0.7


@pytest.mark.parity
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "peft")),
    reason="needs the extra `parity`: pip install -e '.[parity]'",
)
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_statistics_are_those_of_peft(dense, rate):
    """PEFT's own layer, in training: the same two values, as often; and none where it evaluates."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    forward, params, adapter = dense
    base = torch.nn.Linear(WIDTH, OUT)
    layer = Linear(base, "default", LoraConfig(r=WIDTH, lora_alpha=WIDTH, lora_dropout=rate), r=WIDTH, lora_alpha=WIDTH)
    with torch.no_grad():
        base.weight.zero_()
        base.bias.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(WIDTH))
        layer.lora_B["default"].weight.copy_(torch.eye(WIDTH))
        x = torch.ones(ROWS, WIDTH)
        torch.manual_seed(0)
        theirs, evaluated = layer.train()(x).numpy(), layer.eval()(x).numpy()
    ours = np.asarray(forward(params, lora.with_dropout(KEY, adapter, rate), np.ones((ROWS, WIDTH), np.float32)))
    np.testing.assert_allclose(np.unique(ours.round(5)), np.unique(theirs.round(5)), rtol=1e-5)
    error = np.sqrt(2 * rate * (1 - rate) / ours.size)
    assert abs((ours > 0).mean() - (theirs > 0).mean()) < 4 * error
    np.testing.assert_array_equal(evaluated, np.asarray(forward(params, adapter, np.ones((ROWS, WIDTH), np.float32))))


def test_sites_and_layers_draw_for_themselves_and_embeddings_do_not(params, example):
    """Convolutions, DenseGenerals and scanned layers under remat take it; a rate of 0 gives what no dropout gives."""
    sites = lora.find_sites(Model().apply, params, *example)
    spec = lora.LoRA(rank=2, targets=".*", exclude="depthwise")
    adapter, forward = fill(lora.init(KEY, sites, spec)), lora.inject(Model().apply)
    plain = forward(params, adapter, *example)
    np.testing.assert_allclose(forward(params, lora.with_dropout(KEY, adapter, 0.0), *example), plain, rtol=1e-6)
    for name in ("patch", "layers/fc1", "attention/query", "attention/out", "embed"):
        only = {path: leaf * (name in path or "/b" not in path) for path, leaf in tree.flatten(adapter).items()}
        one = tree.unflatten(only)
        before = forward(params, one, *example)
        same = np.allclose(forward(params, lora.with_dropout(KEY, one, 0.5), *example), before, rtol=1e-6)
        assert same == (name == "embed"), name
    keys = lora.with_dropout(KEY, adapter, 0.5)
    drawn = [
        tuple(row)
        for path, leaf in tree.flatten(keys).items() if path.endswith("dropout_key")
        for row in np.asarray(jax.random.key_data(leaf)).reshape(-1, 2).tolist()
    ]  # fmt: skip
    assert len(set(drawn)) == len(drawn) > len(sites) - 1, "three scanned layers have three keys"


def test_gradients_pass_where_numbers_pass(dense):
    forward, params, adapter = dense
    dropping = lora.with_dropout(KEY, adapter, 0.5)
    x = jnp.ones((1, WIDTH))
    kept = np.asarray(forward(params, dropping, x))[0] > 0

    def loss(a):
        return forward(params, {"fc": {**dropping["fc"], "a": a}}, x).sum()

    gradient = np.asarray(jax.grad(loss)(adapter["fc"]["a"]))
    np.testing.assert_array_equal(gradient, np.where(kept[:, None], 2.0, 0.0) * np.ones((WIDTH, WIDTH)))


def test_a_router_sees_what_is_not_dropped(dense):
    """x = (1, 1, …), a gate of 4 x₂: σ(4) = 0.982 of what enters A, which dropout doubles or leaves out."""
    forward, params, _ = dense
    a, gate = jnp.zeros((WIDTH, 2)).at[0, 0].set(1), jnp.zeros((WIDTH, 2)).at[1, 0].set(4)
    site = {"a": a, "b": jnp.ones((2, OUT)), "scale": jnp.float32(1), "gate": gate}
    said = np.asarray(forward(params, lora.with_dropout(KEY, {"fc": site}, 0.5), jnp.ones((100, WIDTH))))
    assert set(np.unique(said.round(4))) == {0.0, np.float32(2 / (1 + np.exp(-4))).round(4)}
