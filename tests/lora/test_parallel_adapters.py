"""Adapters beside whole layers: the layer's output and gradients against the formula, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompted_toy import make_bound

from fedvlm_jax import lora
from fedvlm_jax.lora import LoraError
from fedvlm_jax.lora.parallel import add_parallel
from fedvlm_jax.models.vision_transformer import Beside

RNG = np.random.default_rng(3)
WIDTH, RANK, ALPHA = 5, 3, 0.01
LEAVES = {
    "into": RNG.normal(size=(WIDTH + 1, RANK)), "middle": RNG.normal(size=(RANK + 1, RANK)),
    "back": RNG.normal(size=(RANK + 1, WIDTH)),
}  # fmt: skip
LEAVES = {name: leaf.astype(np.float32) for name, leaf in LEAVES.items()}
X, OUT = RNG.normal(size=(2, 4, WIDTH)).astype(np.float32)


def add(leaves, x, out, scale=ALPHA):
    variables = {"lora": {**leaves, "scale": jnp.float32(scale)}}
    return Beside().apply(variables, x, out, method=lambda module, x, out: add_parallel(module, x, out))


def test_it_adds_what_the_three_matrices_make():
    hidden = X
    for name in ("into", "middle"):
        hidden = np.maximum(hidden @ LEAVES[name][:-1] + LEAVES[name][-1], 0)
    want = OUT + ALPHA * (hidden @ LEAVES["back"][:-1] + LEAVES["back"][-1])
    np.testing.assert_allclose(add(LEAVES, X, OUT), want, rtol=1e-5)


def test_gradients_of_the_matrices_are_those_without_its_factor_and_the_input_s_is_not():
    def loss(leaves, x, scale):
        return jnp.sum(jnp.sin(jnp.arange(OUT.size)).reshape(OUT.shape) * add(leaves, x, OUT, scale))

    small, whole = (jax.grad(loss, (0, 1))(LEAVES, X, scale) for scale in (ALPHA, 1.0))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5), small[0], whole[0])
    np.testing.assert_allclose(small[1], ALPHA * whole[1], rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(LEAVES, X, 0.0)))


@pytest.mark.broad  # seconds of compiling
def test_a_fresh_one_changes_nothing_in_either_tower():
    vlm, _, params = make_bound(vectors=0)
    spec = lora.LoRA(targets=(), parallel=2, parallel_at=vlm.layers)
    adapter = lora.init(jax.random.key(0), vlm.sites, spec)
    assert jax.tree.map(jnp.shape, adapter["vision_tower"]["layers"]["beside"]) == {
        "into": (2, 9, 2), "middle": (2, 3, 2), "back": (2, 3, 8), "scale": (2,),
    }  # fmt: skip
    batch = {"pixel_values": jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), "labels": jnp.zeros((2, 1), jnp.int32)}
    np.testing.assert_array_equal(vlm.logits(params, adapter, batch), vlm.logits(params, None, batch))
    for tower in ("vision_tower", "text_model"):
        moved = jax.tree_util.tree_map_with_path(
            lambda path, leaf, tower=tower: (
                leaf + jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)
                if (path[0].key, path[-1].key) == (tower, "back")
                else leaf
            ),
            adapter,
        )
        assert not np.allclose(vlm.logits(params, moved, batch), vlm.logits(params, None, batch))


def test_a_matrix_that_is_missing_or_does_not_fit_is_refused():
    with pytest.raises(LoraError, match="middle has shape nothing"):
        add({name: leaf for name, leaf in LEAVES.items() if name != "middle"}, X, OUT)
    with pytest.raises(LoraError, match=r"back has shape \(3, 5\) inside the layer, expected \(4, 5\)"):
        add({**LEAVES, "back": LEAVES["back"][1:]}, X, OUT)
