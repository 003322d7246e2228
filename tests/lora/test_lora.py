"""Adapters on linen models: identity, merging, algebra, and every way of silently doing nothing made loud."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from linen_models import Model

from fedvlm_jax import lora
from fedvlm_jax.utils import tree

ADAPTABLE = lora.LoRA(rank=2, alpha=3.0, targets=".*", exclude="depthwise")


def randomise(adapter, seed=3):
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def sites(params, example):
    return lora.find_sites(Model().apply, params, *example)


@pytest.fixture(scope="module")
def adapter(sites):
    return lora.init(jax.random.key(4), sites, ADAPTABLE)


def test_sites_of_every_kind(sites):
    summary = {path: (s.kind, s.stack, s.stack_at, s.d_in, s.d_out) for path, s in sites.items()}
    assert summary == {
        "attention/key": ("dense_general", (), (), 6, 6),
        "attention/out": ("dense_general", (), (), 6, 6),
        "attention/query": ("dense_general", (), (), 6, 6),
        "attention/value": ("dense_general", (), (), 6, 6),
        "depthwise": ("conv", (), (), 9, 6),
        "embed": ("embed", (), (), 11, 6),
        "layers/fc1": ("dense", (3,), (1,), 6, 12),
        "layers/fc2": ("dense", (3,), (1,), 12, 6),
        "patch": ("conv", (), (), 27, 6),
    }
    assert sites["attention/out"].inputs == (2, 3)
    assert sites["attention/out"].outputs == (6,)
    assert "6 groups" in sites["depthwise"].obstacle


def test_initialising_shows_the_sites_too(sites, params, example):
    shapes, found = lora.trace_init(Model().init, jax.random.key(0), *example)
    assert found == sites
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes["params"]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )


def test_the_adapter_written_out(adapter):
    shapes = jax.tree.map(lambda leaf: leaf.shape, adapter)
    assert shapes["layers"] == {
        "fc1": {"a": (3, 6, 2), "b": (3, 2, 12), "scale": (3,)},
        "fc2": {"a": (3, 12, 2), "b": (3, 2, 6), "scale": (3,)},
    }
    assert shapes["patch"] == {"a": (27, 2), "b": (2, 6), "scale": ()}
    assert shapes["embed"] == {"a": (11, 2), "b": (2, 6), "scale": ()}
    assert float(adapter["patch"]["scale"]) == 1.5


def test_none_and_a_fresh_adapter_are_the_base(params, adapter, example):
    forward = lora.inject(Model().apply)
    base = Model().apply({"params": params}, *example)
    np.testing.assert_array_equal(forward(params, None, *example), base)
    for given in (params, {"params": params}):
        injected = forward(given, adapter, *example)
        if jax.default_backend() == "cpu":
            np.testing.assert_array_equal(injected, base)
        else:  # a GPU adds a bias within the product or after it, by what stands beside it
            np.testing.assert_allclose(injected, base, rtol=0, atol=2e-6)


def test_injected_equals_merged(params, adapter, example):
    adapter = randomise(adapter)
    forward = lora.inject(Model().apply)
    merged = lora.merge(params, adapter)
    injected = forward(params, adapter, *example)
    np.testing.assert_allclose(injected, Model().apply({"params": merged}, *example), rtol=2e-5, atol=2e-5)
    assert np.abs(injected - forward(params, None, *example)).max() > 0.1
    restored = lora.unmerge(merged, adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), restored, params)
    assert set(lora.merge({"params": params}, adapter)) == {"params"}


def test_every_site_matters_and_gradients_match_the_merged_model(params, adapter, sites, example):
    adapter = randomise(adapter)
    forward = lora.inject(Model().apply)

    def loss(adapter):
        return jnp.sum(jnp.square(forward(params, adapter, *example)))

    def merged_loss(adapter):
        return jnp.sum(jnp.square(Model().apply({"params": lora.merge(params, adapter)}, *example)))

    got, want = jax.jit(jax.grad(loss))(adapter), jax.grad(merged_loss)(adapter)
    for path, leaf in tree.flatten(got).items():
        expected = tree.flatten(want)[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=path)
    # Attention is blind to a shift of all its scores, so a key's bias would have no gradient; its weights do.
    for path, leaf in tree.flatten(got).items():
        assert (np.abs(leaf).max() > 1e-4) != path.endswith("scale"), path


def test_vmap_over_adapters_keeps_base_matmuls_unbatched(params, adapter, example):
    forward = lora.inject(Model().apply)
    clients = jax.vmap(lambda i: jax.tree.map(lambda x: x * i, randomise(adapter)))(jnp.arange(1.0, 4.0))
    together = jax.vmap(forward, in_axes=(None, 0, None, None))(params, clients, *example)
    alone = [forward(params, jax.tree.map(lambda x, k=k: x[k], clients), *example) for k in range(3)]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((2, 1), (0, 1))])
def test_convolutions_with_strides_dilation_and_padding(padding):
    model = nn.Conv(4, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), padding=padding)
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    params = model.init(jax.random.key(1), x)["params"]
    sites = lora.find_sites(model.apply, params, x)
    adapter = randomise(lora.init(jax.random.key(2), sites, lora.LoRA(rank=2)))
    got = lora.inject(model.apply)(params, adapter, x)
    want = model.apply({"params": lora.merge(params, adapter)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_output_keeps_its_dtype():
    model = nn.Dense(4, dtype=jnp.bfloat16)
    x = jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)["params"]
    adapter = randomise(lora.init(jax.random.key(1), lora.find_sites(model.apply, params, x), lora.LoRA(rank=1)))
    assert lora.inject(model.apply)(params, adapter, x).dtype == jnp.bfloat16


def test_nested_stacks():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            class Inner(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return nn.Dense(4, name="fc")(x), None

            axes = {"params": 0, "lora": 0}
            return nn.scan(Inner, variable_axes=axes, split_rngs={"params": True}, length=2)(name="inner")(x, None)

    axes = {"params": 0, "lora": 0}
    model = nn.scan(Outer, variable_axes=axes, split_rngs={"params": True}, length=3)(name=None)
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x, None)["params"]
    sites = lora.find_sites(model.apply, params, x, None)
    (site,) = sites.values()
    assert (site.stack, site.stack_at) == ((3, 2), (0, 1))
    assert lora.trace_init(model.init, jax.random.key(0), x, None)[1] == sites
    adapter = randomise(lora.init(jax.random.key(1), sites, lora.LoRA(rank=1)))
    got, _ = lora.inject(model.apply)(params, adapter, x, None)
    want, _ = model.apply({"params": lora.merge(params, adapter)}, x, None)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    shared, personal = lora.partition(adapter, r"^2/inner/1/fc/b", sites)
    assert list(tree.flatten(shared)) == ["inner/fc/b/2.1"]
    jax.tree.map(np.testing.assert_array_equal, lora.combine(shared, personal), adapter)


# --- Loud errors ---


def test_no_target_matches_lists_the_paths(sites):
    with pytest.raises(lora.LoraError, match=r"o_proj(.|\n)*layers/fc1/kernel  dense  \[3\] × 6 → 12"):
        lora.init(jax.random.key(0), sites, lora.LoRA(targets="o_proj"))


def test_grouped_convolutions_are_refused(sites):
    with pytest.raises(lora.LoraError, match="grouped convolution, 6 groups"):
        lora.init(jax.random.key(0), sites, lora.LoRA(targets="depthwise", rank=1))


@pytest.mark.parametrize("rank", [0, 7])
def test_impossible_ranks(sites, rank):
    with pytest.raises(lora.LoraError, match="rank"):
        lora.init(jax.random.key(0), sites, lora.LoRA(rank=rank, targets="fc1"))


def test_bad_regular_expression(sites):
    with pytest.raises(lora.LoraError, match="not a regular expression"):
        lora.init(jax.random.key(0), sites, lora.LoRA(targets="("))


def test_a_scan_that_drops_the_collection_is_an_error(params, adapter, example):
    forward = lora.inject(Model(carry_lora=False).apply)
    with pytest.raises(lora.LoraError, match=r"layers/fc1/a(.|\n)*a scan without variable_axes"):
        forward(params, adapter, *example)


def test_a_leaf_of_another_model_is_an_error(params, example):
    stray = {"decoder": {"fc": {"a": jnp.ones((6, 1)), "b": jnp.ones((1, 6)), "scale": jnp.ones(())}}}
    with pytest.raises(lora.LoraError, match=r"decoder/fc/a(.|\n)*made for another model"):
        lora.inject(Model().apply)(params, stray, *example)
    with pytest.raises(lora.LoraError, match="no kernel or embedding at 'decoder/fc'"):
        lora.merge(params, stray)


def test_an_adapter_on_a_bare_parameter_is_an_error():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (3, 3))

    adapter = {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3)), "scale": jnp.ones(())}
    params = Bare().init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    assert lora.find_sites(Bare().apply, params, jnp.ones((1, 3))) == {}
    with pytest.raises(lora.LoraError, match="never read"):
        lora.inject(Bare().apply)(params, adapter, jnp.ones((1, 3)))


@pytest.mark.parametrize("name", ["a", "b", "scale"])
def test_wrong_shapes_are_errors(params, adapter, example, name):
    flat = tree.flatten(adapter)
    flat[f"layers/fc1/{name}"] = jnp.ones((3, 5, 5)) if name != "scale" else jnp.ones((3, 2))
    with pytest.raises(lora.LoraError, match=f"layers/fc1/{name}|incompatible|layers/fc1/a"):
        lora.inject(Model().apply)(params, tree.unflatten(flat), *example)


def test_a_missing_factor_is_an_error(params, adapter, example):
    flat = tree.flatten(adapter)
    del flat["patch/b"]
    with pytest.raises(lora.LoraError, match="patch has no 'b'"):
        lora.inject(Model().apply)(params, tree.unflatten(flat), *example)


# --- Algebra ---


def product(adapter, path):
    a, b, scale = dict(lora.sites_of(adapter))[path]
    return jnp.matmul(a, b) * scale[..., None, None]


def test_concatenation_adds_the_terms(adapter):
    one, two = randomise(adapter, 5), randomise(adapter, 6)
    both = lora.concatenate(one, two)
    for path, (a, _, _) in lora.sites_of(both):
        assert a.shape[-1] == 4
        np.testing.assert_allclose(product(both, path), product(one, path) + product(two, path), atol=1e-5)


def test_truncation_is_the_dense_svd_s(adapter):
    wide = lora.concatenate(randomise(adapter, 5), randomise(adapter, 6))
    narrow = lora.truncate(wide, 2)
    for path, (a, b, _) in lora.sites_of(narrow):
        assert (a.shape[-1], b.shape[-2]) == (2, 2)
        u, s, vt = np.linalg.svd(np.asarray(product(wide, path)), full_matrices=False)
        best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
        np.testing.assert_allclose(product(narrow, path), best, atol=2e-5, err_msg=path)
    with pytest.raises(lora.LoraError, match="between 1 and"):
        lora.truncate(wide, 99)


def test_rslora_and_kaiming(sites):
    spec = dataclasses.replace(ADAPTABLE, rslora=True, init="kaiming")
    adapter = lora.init(jax.random.key(0), sites, spec)
    assert float(adapter["patch"]["scale"]) == pytest.approx(3 / np.sqrt(2))
    assert np.abs(adapter["patch"]["a"]).max() <= 1 / np.sqrt(27)


def test_draws_of_one_site_do_not_depend_on_the_others(sites, adapter):
    alone = lora.init(jax.random.key(4), sites, dataclasses.replace(ADAPTABLE, targets="patch"))
    np.testing.assert_array_equal(alone["patch"]["a"], adapter["patch"]["a"])
    assert not np.array_equal(adapter["attention"]["key"]["a"], adapter["attention"]["query"]["a"])


# --- Rules ---


def test_partition_by_factor(adapter):
    shared, personal = lora.partition(adapter, r"/b$")
    assert {path.rpartition("/")[2] for path in tree.flatten(shared)} == {"b"}
    assert {path.rpartition("/")[2] for path in tree.flatten(personal)} == {"a", "scale"}
    jax.tree.map(np.testing.assert_array_equal, lora.combine(shared, personal), adapter)


@pytest.mark.parametrize("know_sites", [True, False])
def test_partition_by_single_layers(adapter, sites, know_sites):
    rule = lora.Rule(r"layers/[02]/fc1/(a|b)$", exclude=r"layers/2/fc1/a")
    shared, personal = lora.partition(adapter, rule, sites if know_sites else None)
    assert list(tree.flatten(shared)) == ["layers/fc1/a/0", "layers/fc1/b/0", "layers/fc1/b/2"]
    assert {"layers/fc1/a/1", "layers/fc1/a/2", "layers/fc1/b/1"} < set(tree.flatten(personal))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lora.combine)(shared, personal), adapter)
    missing = tree.unflatten({p: x for p, x in tree.flatten(personal).items() if p != "layers/fc1/b/1"})
    with pytest.raises(lora.LoraError, match=r"layers are missing: \[\(1,\)\]"):
        lora.combine(shared, missing)


def test_a_function_as_rule(adapter, sites):
    shared, _ = lora.partition(adapter, lambda path: path.endswith("fc2/b"))
    assert list(tree.flatten(shared)) == ["layers/fc2/b"]
    shared, _ = lora.partition(adapter, lambda path: "layers/1" in path, sites)
    assert "layers/fc1/a/1" in tree.flatten(shared)
    with pytest.raises(lora.LoraError, match="pass sites="):
        lora.partition(adapter, lambda path: "layers/1" in path)


def test_a_rule_that_matches_nothing_lists_the_paths(adapter, sites):
    with pytest.raises(lora.LoraError, match="layers/2/fc2/scale"):
        lora.partition(adapter, "encoder", sites)
    shared, personal = lora.partition(adapter, lora.Rule(()))
    assert shared == {}
    assert list(tree.flatten(personal)) == list(tree.flatten(adapter))


def test_overlapping_sides_are_an_error(adapter):
    with pytest.raises(lora.LoraError, match="more than one"):
        lora.combine(adapter, adapter)


@pytest.mark.parametrize("merged", [False, True])
def test_the_scale_is_data_to_whoever_differentiates_by_the_adapter(params, adapter, example, merged):
    """SGD over all leaves moved a scale of 2 to 2.03 in 20 steps; weight decay moves it unless it is masked."""
    target = randomise(Model().apply({"params": params}, *example))
    forward = lora.inject(Model().apply)
    start = tree.unflatten(
        {
            path: leaf if path.endswith("scale") else 0.3 * jnp.ones_like(leaf)
            for path, leaf in tree.flatten(adapter).items()
        }
    )

    @jax.jit
    def loss(adapter):
        weights = lora.merge(params, lora.concatenate(adapter, adapter)) if merged else params
        return jnp.mean(jnp.square(forward(weights, None if merged else adapter, *example) - target))

    gradient = tree.flatten(jax.grad(loss)(start))
    assert all((np.asarray(leaf) == 0).all() == path.endswith("scale") for path, leaf in gradient.items())
    for optimizer in (optax.sgd(10.0), optax.adamw(0.01, weight_decay=0.1, mask=lora.trainable)):
        updates, _ = optimizer.update(jax.grad(loss)(start), optimizer.init(start), start)
        for path, leaf in tree.flatten(updates).items():
            assert (np.asarray(leaf) == 0).all() == path.endswith("scale"), path


def test_a_model_of_nnx_is_told_so_in_one_line():
    from flax import nnx

    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    example = jnp.ones((1, 3))
    for given in ((model, {}), (model.__call__, {}), (graph, state), (lambda variables, x: x, state)):
        with pytest.raises(
            lora.LoraError, match=r"is of flax\.nnx, and adapters sit on modules of flax\.linen"
        ) as caught:
            lora.find_sites(*given, example)
        assert "\n" not in str(caught.value)
    wrapped = nnx.bridge.to_linen(nnx.Linear, 3, 4)  # which hides its layers, as the message says
    assert lora.find_sites(wrapped.apply, wrapped.init(jax.random.key(0), example), example) == {}
