"""CLIP with soft prompts: what a fresh one leaves as it is, room for more vectors than words, and several at once."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompted_toy import CLASSES, EMBEDDING, END, VECTORS, make_bound, make_config, tokenise

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.clip import build
from fedvlm_jax.utils import tree

PATH = "text_model/token_embedding/prompt"


def with_prompt(prompt):
    return tree.unflatten({PATH: jnp.asarray(prompt)})


@pytest.fixture(scope="module")
def bound():
    return make_bound()


def test_words_are_filled_up_for_the_prompt_alone():
    """With fewer words than vectors an X for each that is lacking; who has no prompt is asked as before."""
    _, wide, _ = make_bound(vectors=4, template="a photo {}")
    _, narrow, _ = make_bound(vectors=1, template="a photo {}")
    assert wide.prompt_ids.tolist() == narrow.prompt_ids.tolist() == narrow.prompted_ids.tolist()
    wanted = tokenise([f"X X a photo {name}" for name in CLASSES])["input_ids"]
    assert wide.prompted_ids.tolist() == wanted
    assert wide.make_room("{} of X", 2) == "X X {} of X"
    assert wide.prompted_ids.shape[1] == wide.prompt_ids.shape[1] + 2
    assert (wide.prompt_ids[:, -1] == END).all()


def test_more_vectors_than_a_prompt_has_tokens_are_refused_before_they_are_written_out():
    with pytest.raises(UserError, match=r"--prompt\.vectors 2147483647: prompts have 12 tokens at most"):
        make_bound(vectors=2**31 - 1)


@pytest.mark.broad  # seconds of compiling
def test_a_fresh_prompt_changes_nothing_and_others_are_embedded_one_by_one(bound):
    vlm, _, params = bound
    embed = jax.jit(vlm.texts)
    words = embed(params, None)
    assert words.shape == (len(CLASSES), EMBEDDING)
    np.testing.assert_allclose(embed(params, with_prompt(np.zeros((VECTORS, 8)))), words, atol=1e-6)
    several = np.random.default_rng(0).normal(size=(3, VECTORS, 8)).astype(np.float32)
    found = embed(params, with_prompt(several))
    for one, prompt in zip(found, several, strict=True):
        np.testing.assert_allclose(one, embed(params, with_prompt(prompt)), atol=1e-5)
    assert not np.allclose(found[0], words, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)


@pytest.mark.broad
def test_patches_stand_behind_the_picture_and_are_kept_as_it_is():
    vlm, _, params = make_bound()
    seeing = vlm.see_patches()
    pixels = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    plain, patches = vlm.image_features(params, None, pixels), seeing.image_features(params, None, pixels)
    assert (plain.shape, patches.shape) == ((2, 1, EMBEDDING), (2, 5, EMBEDDING))
    assert (vlm.image_tokens(8, 8), seeing.image_tokens(8, 8)) == (1, 5)
    assert seeing.fingerprint != vlm.fingerprint
    np.testing.assert_allclose(patches[:, :1], plain, atol=1e-6)
    labels = jnp.zeros((2, 1), jnp.int32)
    given, computed = (
        seeing.logits(params, None, {**batch, "labels": labels})
        for batch in ({"image_features": patches}, {"pixel_values": pixels})
    )
    np.testing.assert_allclose(given, computed, atol=1e-5)


def test_a_prompt_that_the_classes_have_no_room_for_is_refused(bound):
    vlm, _, params = bound
    with pytest.raises(UserError, match=f"has 4 vectors, and the classes were bound with room for {VECTORS}"):
        jax.eval_shape(lambda: vlm.texts(params, with_prompt(np.zeros((4, 8), np.float32))))


def test_a_model_without_soft_prompts_has_the_caches_that_it_had():
    """A fingerprint is part of a cache's name: of classes and their tokens alone, as before there were prompts."""
    vlm, processor, _ = make_bound(vectors=0)
    hashed = repr((vlm.classes, processor.prompt_ids.tolist())).encode()
    assert vlm.fingerprint.endswith(f"}}\n {hashlib.blake2b(hashed, digest_size=16).hexdigest()}")
    assert make_bound(vectors=2)[0].fingerprint != vlm.fingerprint


def test_a_plan_reckons_with_room_for_names():
    vlm = build(make_config(), dtype=jnp.float32)
    spec = lora.LoRA(rank=2, targets=(), prompt=16, prompt_at=vlm.prompt_at)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), vlm.sites, spec))
    assert jax.eval_shape(vlm.texts, vlm.shapes(), adapter).shape == (100, EMBEDDING)
