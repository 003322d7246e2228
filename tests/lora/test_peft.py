"""LoRA against PEFT 0.21 on the same weights: output, gradients of A, B and the input, merged weights, inits.

The numbers come from golden_peft.npz (see make_golden.py), or, marked `parity`, from PEFT in the same process on
other random weights.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedvlm_jax import lora

FILE = Path(__file__).with_name("golden_peft.npz")


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 6, name="embed")
        return table.attend(jnp.tanh(table(ids)))


class Lookup(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Embed(11, 6, name="embed")(ids)


# name -> (our layer, what an adapter for it looks like)
DENSE = {
    "linear": (nn.Dense(5), lora.LoRA(rank=3, alpha=6)),
    "linear_rslora": (nn.Dense(5), lora.LoRA(rank=3, alpha=6, rslora=True)),
    "linear_no_bias": (nn.Dense(9, use_bias=False), lora.LoRA(rank=4, alpha=3)),
}
CONV = {
    "conv": (nn.Conv(4, (3, 2), strides=(2, 1), padding=((1, 1), (0, 0))), lora.LoRA(rank=2, alpha=5)),
    "conv_patch": (nn.Conv(6, (4, 4), strides=4, padding="VALID"), lora.LoRA(rank=5, alpha=5, rslora=True)),
}
TABLE = {"embedding": (Lookup(), lora.LoRA(rank=2, alpha=3)), "tied": (Tied(), lora.LoRA(rank=2, alpha=3))}
LAYERS = DENSE | CONV | TABLE
INITS = [(kind, init) for kind in ("linear", "conv") for init in ("kaiming", "gaussian")]


@pytest.fixture(
    scope="module",
    params=["golden", pytest.param("live", marks=pytest.mark.parity)],
)
def peft(request):
    """case -> what PEFT says of it."""
    if request.param == "live":
        if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
            pytest.skip("needs the extra `parity`: pip install -e '.[parity]'")
        from lora.make_golden import make

        return make(seed=17)
    found = {}
    with np.load(FILE) as file:
        for name in file:
            case, _, key = name.partition("/")
            found.setdefault(case, {})[key] = file[name]
    return found


def convert(name, answers):
    """PEFT's arrays in our layouts."""
    found = dict(answers)
    if name in DENSE:
        found |= {key: answers[key].T for key in ("weight", "merged", "a", "b", "grad_a", "grad_b")}
    elif name in CONV:
        found |= {key: np.moveaxis(answers[key], 1, -1) for key in ("x", "grad_x", "y", "cotangent")}
        found |= {key: answers[key].transpose(2, 3, 1, 0) for key in ("weight", "merged")}
        for key in ("a", "grad_a"):  # [rank, in, window] -> [window · in, rank]
            found[key] = answers[key].transpose(2, 3, 1, 0).reshape(-1, answers[key].shape[0])
        for key in ("b", "grad_b"):  # [out, rank, 1, 1] -> [rank, out]
            found[key] = answers[key][:, :, 0, 0].T
    else:
        found |= {key: answers[key].T for key in ("a", "b", "grad_a", "grad_b")}
    return found


def to_params(name, theirs):
    if name in TABLE:
        return {"embed": {"embedding": theirs["weight"]}}
    return {"kernel": theirs["weight"]} | ({"bias": theirs["bias"]} if "bias" in theirs else {})


def assert_close(got, want, what):
    """To float32 accuracy: an error of a few units in the last place of the largest number."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=what)


@pytest.mark.parametrize("name", LAYERS)
def test_output_gradients_and_merged_weights(peft, name):
    theirs = convert(name, peft[name])
    model, spec = LAYERS[name]
    params = to_params(name, theirs)
    sites = lora.find_sites(model.apply, params, theirs["x"])
    adapter = lora.init(jax.random.key(0), sites, spec)
    site = adapter["embed"] if name in TABLE else adapter
    assert {key: site[key].shape for key in "ab"} == {key: theirs[key].shape for key in "ab"}
    np.testing.assert_allclose(site["scale"], theirs["scaling"], rtol=1e-6)
    site |= {"a": jnp.asarray(theirs["a"]), "b": jnp.asarray(theirs["b"])}

    forward = lora.inject(model.apply)
    output = jax.jit(forward)(params, adapter, theirs["x"])
    assert_close(output, theirs["y"], "output")
    assert np.abs(forward(params, None, theirs["x"]) - theirs["y"]).max() > 0.1  # the adapter is not lost in the base

    def loss(adapter, x):
        return jnp.sum(forward(params, adapter, x) * theirs["cotangent"])

    if name in TABLE:
        gradient = jax.jit(jax.grad(loss))(adapter, theirs["x"])["embed"]
    else:
        gradient, by_input = jax.jit(jax.grad(loss, argnums=(0, 1)))(adapter, theirs["x"])
        assert_close(by_input, theirs["grad_x"], "gradient of the input")
    assert_close(gradient["a"], theirs["grad_a"], "gradient of A")
    assert_close(gradient["b"], theirs["grad_b"], "gradient of B")

    merged = lora.merge(params, adapter)
    assert_close((merged["embed"]["embedding"] if name in TABLE else merged["kernel"]), theirs["merged"], "merged")


@pytest.mark.parametrize(("kind", "init"), INITS)
def test_fresh_factors_are_drawn_as_peft_draws_them(peft, kind, init):
    """Quantiles of A agree as those of two samples of this size do; B is zero in both."""
    model, x = (nn.Dense(40), (1, 512)) if kind == "linear" else (nn.Conv(40, (3, 3)), (1, 4, 4, 64))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(x))["params"]
    sites = lora.find_sites(model.apply, params, jax.ShapeDtypeStruct(x, jnp.float32))
    adapter = lora.init(jax.random.key(5), sites, lora.LoRA(rank=32, init=init))
    theirs = peft[f"init_{kind}_{init}"]
    assert not adapter["b"].any()
    assert theirs["largest_b"] == 0

    d_in, size = adapter["a"].shape[0], adapter["a"].size
    ours = np.quantile(adapter["a"], np.linspace(0, 1, len(theirs["quantiles"])))
    if init == "kaiming":
        bound = d_in**-0.5
        # The standard error of a uniform quantile is at most 2·bound·√(¼ / n), of a difference √2 times that.
        np.testing.assert_allclose(ours, theirs["quantiles"], atol=4 * bound * (2 / size) ** 0.5)
        for sample in (ours, theirs["quantiles"]):
            assert 0.998 * bound < np.abs(sample).max() <= bound * (1 + 1e-6)
    else:
        # Of a normal quantile it is √(q(1−q)/n) / density, at most 2.5 σ/√n for q between 1/32 and 31/32.
        inner = slice(1, -1)
        np.testing.assert_allclose(ours[inner], theirs["quantiles"][inner], atol=4 * 2.5 / 32 * (2 / size) ** 0.5)
        np.testing.assert_allclose(np.std(adapter["a"]), 1 / 32, rtol=0.02)
