"""What is encoded and decoded again: bounds, means over draws, bytes, and numbers at the edges of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedvlm_jax.messages.compression import (
    count_kept,
    decode_int8,
    decode_top_k,
    encode_int8,
    encode_top_k,
    make_codec,
)
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.utils import tree

SHAPES = {"site/a": (3, 5, 2), "site/b": (3, 2, 4), "other/c": (7,), "other/r": (2, 2)}
ENTRIES = sum(int(np.prod(shape)) for shape in SHAPES.values())
TINY = float(np.finfo(np.float32).tiny)
KEY = jax.random.key(3)

send_int8 = jax.jit(lambda message, key: decode_int8(encode_int8(message, key), message))
send_top_k = jax.jit(lambda message: decode_top_k(encode_top_k(message, 0.25), message))


def flat(message):
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(message).items()}


def list_scales(leaf):
    """The largest entry of each matrix of a leaf, over 127, in its place."""
    axes = tuple(range(max(leaf.ndim - 2, 0), leaf.ndim))
    return np.maximum(np.abs(leaf).max(axis=axes, keepdims=True) / np.float32(127), TINY)


def messages(floats):
    return st.fixed_dictionaries(
        {path: arrays.arrays(np.float32, shape, elements=floats) for path, shape in SHAPES.items()}
    )


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)  # zeros, negative ones and denormals among them


@settings(max_examples=30, deadline=None)
@given(messages(FINITE), st.integers(0, 2**31))
def test_int8_is_within_a_level_of_each_entry(leaves, seed):
    got = flat(send_int8(tree.unflatten(leaves), jax.random.key(seed)))
    for path, leaf in leaves.items():
        assert got[path].dtype == leaf.dtype
        level = list_scales(leaf)
        assert (np.abs(got[path] - leaf) <= level * 1.00001).all()
        assert np.array_equal(got[path][leaf == 0], leaf[leaf == 0] * 0)
        assert (
            np.abs(got[path]) <= np.abs(leaf).max() * 1.00001 + 127 * TINY * (np.abs(leaf).max() < 127 * TINY)
        ).all()


@settings(max_examples=30, deadline=None)
@given(messages(FINITE))
def test_top_k_sends_the_largest_as_they_are_and_nothing_else(leaves):
    got = flat(send_top_k(tree.unflatten(leaves)))
    row, sent = (np.concatenate([part[path].ravel() for path in sorted(part)]) for part in (leaves, got))
    kept = count_kept(ENTRIES, 0.25)
    out = sent != 0
    assert np.array_equal(sent[out], row[out])
    assert out.sum() <= kept
    # On the device a denormal may be zero, so it has no place among others.
    order = np.sort(np.where(np.abs(row) < TINY, 0, np.abs(row)))[::-1]
    assert (np.abs(row[~out]) <= max(order[kept - 1], TINY)).all()


@settings(max_examples=20, deadline=None)
@given(messages(FINITE), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, ENTRIES - 1))
def test_what_is_not_finite_stays_so(leaves, poison, place):
    """So that the engine leaves its client out, as without compression."""
    row = np.concatenate([leaves[path].ravel() for path in sorted(leaves)])
    row[place] = poison
    ends = np.cumsum([leaves[path].size for path in sorted(leaves)])[:-1]
    parts = zip(sorted(leaves), np.split(row, ends), strict=True)
    message = tree.unflatten({path: part.reshape(SHAPES[path]) for path, part in parts})
    assert not all(np.isfinite(leaf).all() for leaf in flat(send_int8(message, KEY)).values())
    sent = send_top_k(message)
    owed = jax.tree.map(jnp.subtract, message, sent)
    assert not all(np.isfinite(leaf).all() for leaf in (*flat(sent).values(), *flat(owed).values()))


def test_integers_and_what_would_not_shrink_are_sent_as_they_are():
    message = {"update": {"b": jnp.ones((2, 1, 1))}, "rank": jnp.int32(7), "wide": jnp.full((4, 8), 0.3)}
    encoded = encode_int8(message, KEY)
    assert set(flat(encoded["plain"])) == {"update/b", "rank"}
    assert set(flat(encoded["rounded"])) == {"wide"}
    got = decode_int8(encoded, message)
    assert (int(got["rank"]), got["rank"].dtype) == (7, jnp.int32)
    assert np.array_equal(got["update"]["b"], message["update"]["b"])


def test_nothing_is_encoded_as_nothing():
    assert tree.count_bytes(encode_int8({}, KEY)) == 0
    assert decode_int8(encode_int8({}, KEY), {}) == {}


def test_bfloat16_comes_back_as_bfloat16():
    message = {"b": jnp.asarray([[1.0, -0.5, 0.25, 3.0]], jnp.bfloat16)}
    for sent in (send_int8(message, KEY), send_top_k(message)):
        assert sent["b"].dtype == jnp.bfloat16


DRAWS = 20_000


def test_int8_has_the_mean_of_what_was_sent():
    """Within five standard errors for each entry; the nearest level would be off by up to half a level."""
    rng = np.random.default_rng(0)
    leaf = rng.normal(size=(2, 3, 5)).astype(np.float32)
    leaf[0, 0] = [0.0, 1e-6, -1e-6, 0.004, -0.004]
    draws = jax.vmap(lambda key: send_int8({"b": leaf}, key)["b"])(jax.random.split(KEY, DRAWS))
    level = list_scales(leaf)
    share = leaf / level - np.floor(leaf / level)
    spread = level * np.sqrt(share * (1 - share) / DRAWS)
    off = np.abs(np.asarray(draws, np.float64).mean(axis=0) - leaf)
    assert (off <= 5 * spread + 1e-6 * level).all()
    nearest = np.abs(np.round(leaf / level) * level - leaf)
    assert (nearest > 5 * spread + 1e-6 * level).mean() > 0.5, "the test could not tell a biased rounding"
    np.testing.assert_allclose(
        np.asarray(draws, np.float64).std(axis=0),
        np.broadcast_to(spread * np.sqrt(DRAWS), leaf.shape),
        rtol=0.1,
        atol=1e-4,
    )


def test_draws_are_the_client_s_and_the_round_s():
    message = {"a": jnp.full((4, 9), 0.3), "b": jnp.full((4, 9), 0.3).at[0, 0].set(1)}
    one, same, other = (send_int8(message, key) for key in (KEY, KEY, jax.random.fold_in(KEY, 1)))
    assert np.array_equal(one["b"], same["b"])
    assert not np.array_equal(one["b"], other["b"])
    twice = {"a": message["b"], "b": message["b"]}
    assert not np.array_equal(*send_int8(twice, KEY).values()), "two leaves read the same draws"


@pytest.mark.parametrize(
    ("entries", "width"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_places_take_the_smallest_width(entries, width):
    """And the last entry has one: it is the largest here."""
    message = {"b": jnp.zeros(entries).at[-1].set(-2.0)}
    encoded = encode_top_k(message, 1e-9)
    assert encoded["places"].dtype.name == width
    assert encoded["places"].tolist() == [entries - 1]
    assert np.array_equal(decode_top_k(encoded, message)["b"], message["b"])


def test_bytes_by_hand():
    """65 entries: every leaf has a scale for each of its matrices, one alone without a stack."""
    message = tree.unflatten({path: jnp.ones(shape) for path, shape in SHAPES.items()})
    # site/a: 30 + 3 scales; site/b: 24 + 3 scales; other/c: 7 + 1 scale; other/r: 4 + 1 scale.
    assert tree.count_bytes(encode_int8(message, KEY)) == 30 + 24 + 7 + 4 + 4 * (3 + 3 + 1 + 1)
    assert tree.count_bytes(encode_top_k(message, 0.25)) == 16 * (4 + 1)
    assert (ENTRIES, count_kept(ENTRIES, 0.25)) == (65, 16)
    assert tree.count_bytes(encode_top_k(message, 1.0)) == 65 * 4


def test_a_codec_is_the_pair_that_its_name_says():
    message = {"b": jnp.asarray([[0.5, -2.0, 0.0, 1.0]])}
    for options in (MessageOptions(compress="int8"), MessageOptions(compress="top-k", keep=0.5)):
        codec = make_codec(options)
        got = codec.decode(codec.encode(message, KEY), jax.eval_shape(lambda: message))
        assert float(got["b"][0, 1]) == pytest.approx(-2.0)
