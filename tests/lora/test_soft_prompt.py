"""A soft prompt as a leaf of an adapter: what it does to embeddings, how rules split it, and what refuses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax import lora
from fedvlm_jax.lora import LoraError


class Reader(nn.Module):
    def setup(self):
        self.words = nn.Embed(7, 4)
        self.out = nn.Dense(3)

    def __call__(self, ids):
        return self.out(self.words(ids))


IDS = jnp.asarray([[0, 1, 2, 3, 6], [0, 4, 4, 6, 6]])
MODEL = Reader()
PARAMS = MODEL.init(jax.random.key(0), IDS)["params"]
SITES = lora.find_sites(MODEL.apply, PARAMS, IDS)
SPEC = lora.LoRA(rank=2, targets=(), prompt=2, prompt_at="words")


def run(adapter, ids=IDS):
    return lora.inject(MODEL.apply)(PARAMS, adapter, ids)


def test_it_is_added_to_the_tokens_after_the_first():
    prompt = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    embedded = np.array(PARAMS["words"]["embedding"])[np.asarray(IDS)]
    embedded[:, 1:3] += prompt
    want = embedded @ np.asarray(PARAMS["out"]["kernel"]) + np.asarray(PARAMS["out"]["bias"])
    np.testing.assert_allclose(run({"words": {"prompt": jnp.asarray(prompt)}}), want, rtol=1e-5, atol=1e-6)


def test_a_fresh_one_changes_nothing_and_stands_beside_low_rank_factors():
    alone = lora.init(jax.random.key(1), SITES, SPEC)
    assert jax.tree.map(jnp.shape, alone) == {"words": {"prompt": (2, 4)}}
    both = lora.init(jax.random.key(1), SITES, lora.LoRA(rank=2, targets="out|words", prompt=2, prompt_at="words"))
    assert set(both["words"]) == {"a", "b", "scale", "prompt"}
    for adapter in (alone, both):
        np.testing.assert_array_equal(run(adapter), run(None))
    several = jax.vmap(lambda adapter: run(adapter))(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), both))
    np.testing.assert_allclose(several[1], run(jax.tree.map(lambda leaf: leaf + 1, both)), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "why"), [((2, 3), "of width 4"), ((5, 4), "more tokens than it has vectors, here 5"), ((4,), "needs")]
)
def test_one_that_does_not_fit_is_refused(shape, why):
    with pytest.raises(LoraError, match=why):
        run({"words": {"prompt": jnp.zeros(shape)}})


def test_a_prompt_where_nothing_is_embedded_is_refused():
    with pytest.raises(LoraError, match=r"needs an nn\.Embed"):
        run({"out": {"prompt": jnp.zeros((2, 3))}})
    with pytest.raises(LoraError, match="never read"):
        run({"elsewhere": {"prompt": jnp.zeros((2, 3))}})


def test_rules_name_it_or_some_of_its_vectors():
    adapter = {"words": {"prompt": jnp.arange(12.0).reshape(3, 4)}, "out": {"a": jnp.ones((4, 2))}}
    shared, private = lora.partition(adapter, r"prompt$", SITES)
    assert (list(shared), list(private)) == (["words"], ["out"])
    shared, private = lora.partition(adapter, r"prompt/[02]$", SITES)
    assert list(shared["words"]["prompt"]) == ["0", "2"]
    assert list(private["words"]["prompt"]) == ["1"]
    joined = lora.combine(shared, private)
    np.testing.assert_array_equal(joined["words"]["prompt"], adapter["words"]["prompt"])
    assert lora.virtual_paths(adapter, "words/prompt", SITES) == [f"words/prompt/{number}" for number in range(3)]


def test_it_is_no_matrix():
    adapter = lora.init(jax.random.key(1), SITES, SPEC)
    with pytest.raises(LoraError, match="holds prompt: such an adapter is neither merged"):
        lora.merge(PARAMS, adapter)
    assert lora.low_rank(adapter) == {}
    assert lora.with_dropout(jax.random.key(0), adapter, 0.5) == adapter
