"""Heads of a class model against their authors' formulas, which PyTorch computed once, and what they refuse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.zoo import fedotp
from fedvlm_jax.models.clip.heads import moap, split_head, transport
from fedvlm_jax.utils.option_ranges import check_ranges

GOLDEN = np.load(Path(__file__).parents[1] / "methods" / "golden_heads.npz")
HEADS, WIDTH = 2, 6


def make_gate():
    gate = {name.removeprefix("gate/"): GOLDEN[name] for name in GOLDEN.files if name.startswith("gate/")}
    return {
        name: leaf.reshape(*leaf.shape[:-1], HEADS, -1) if not name.startswith("output") else leaf
        for name, leaf in gate.items()
    }


def make_leaves(present):
    return {"gate": make_gate(), "present": jnp.asarray(present), "weight": 0.5, "scaling": 10.0}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pfedmoap_s_mixture_is_its_authors(count):
    """Also where experts are missing, which the authors' code then leaves out, and where they came as embeddings."""
    images, texts = GOLDEN["images"], GOLDEN["texts"]
    present = np.arange(3) < count
    found = moap.logits(images, texts, make_leaves(present * 1.0), jnp.float32(20))
    np.testing.assert_allclose(found, GOLDEN[f"moap/{count}"], atol=1e-5)
    embedded = {**make_leaves(present * 1.0), "experts": texts[1:]}
    np.testing.assert_allclose(moap.logits(images, texts[:1], embedded, jnp.float32(20)), found, atol=1e-6)


def test_an_expert_who_is_not_there_is_not_looked_at():
    images, texts = GOLDEN["images"], jnp.asarray(GOLDEN["texts"])
    one, other = (
        moap.logits(images, texts.at[2].set(value), make_leaves([1.0, 1.0, 0.0]), jnp.float32(20)) for value in (0, 9)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("balanced", "share"), [(1, 1.0), (0, 1.0), (0, 0.6)])
def test_fedotp_s_transport_is_its_authors(balanced, share):
    leaves = {"epsilon": jnp.float32(0.1), "share": jnp.float32(share), "balanced": jnp.float32(balanced)}
    found = transport.logits(jnp.asarray(GOLDEN["images"]), jnp.asarray(GOLDEN["texts"][:2]), leaves, jnp.float32(20))
    np.testing.assert_allclose(found, GOLDEN[f"transport/{balanced}/{share}"], rtol=1e-4, atol=1e-5)


def test_a_plan_takes_what_prompts_ask_for_and_no_patch_gives_more_than_it_has():
    log_kernel = jnp.log(jax.random.uniform(jax.random.key(0), (5, 4, 2), minval=0.1))
    for balanced, share in ((True, 1.0), (False, 0.6)):
        plan = transport.find_plan(log_kernel, jnp.float32(share), jnp.asarray(balanced))
        np.testing.assert_allclose(plan.sum(-2), share / 2, rtol=1e-4)
        assert (plan.sum(-1) <= 1 / 4 + 1e-4).all()
        assert np.allclose(plan.sum(-1), 1 / 4, atol=1e-3) == balanced


def find_plan_in_doubles(likeness, epsilon, share, balanced):
    """The same turns in NumPy, on logarithms in float64."""
    scores = (likeness.astype(np.float64) - 1) / epsilon
    *batch, patches, prompts = scores.shape
    u, v = np.zeros((*batch, patches)), np.zeros((*batch, prompts))
    for _ in range(transport.ITERATIONS):
        u = -np.log(patches) - np.logaddexp.reduce(scores + v[..., None, :], axis=-1)
        u = u if balanced else np.minimum(u, 0)
        v = np.log(share / prompts) - np.logaddexp.reduce(scores + u[..., None], axis=-2)
    return np.exp(u[..., None] + scores + v[..., None, :])


def test_a_plan_of_little_entropy_is_that_of_doubles():
    """Of likenesses from -1 to 1, at ε down to the smallest that the option takes, where K is 0 in float32."""
    find_plan, smallest = jax.jit(transport.find_plan), 1e-4
    likeness = np.random.default_rng(0).uniform(-1, 1, (3, 6, 2)).astype(np.float32)
    for balanced, share in ((True, 1.0), (False, 1.0), (False, 0.6)):
        for epsilon, atol in ((0.1, 1e-6), (1e-2, 1e-5), (1e-3, 1e-4), (smallest, 1e-3)):
            plan = find_plan((likeness - 1) / np.float32(epsilon), np.float32(share), np.asarray(balanced))
            wanted = find_plan_in_doubles(likeness, epsilon, share, balanced)
            np.testing.assert_allclose(plan, wanted, rtol=0, atol=atol)
    check_ranges(fedotp.Options(epsilon=smallest), "method")
    with pytest.raises(UserError, match=r"--method.epsilon is 9e-05: it must be 0.0001 or more"):
        check_ranges(fedotp.Options(epsilon=9e-5), "method")


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="12 numbers, no multiple of it"):
        moap.pool(jnp.zeros((1, 12)), 5)
    with pytest.raises(UserError, match="compares patches"):
        transport.logits(jnp.zeros((1, 1, 4)), jnp.zeros((1, 2, 4)), {}, jnp.float32(1))
    with pytest.raises(UserError, match="head is nothing-like-it"):
        split_head({"head": {"nothing-like-it": {}}})
