"""A causal transformer that reads a prompt once and answers it several times, as Llama and its relatives are built.

Layers are pre-norm: RMS norms, grouped-query attention with rotary positions, a gated feed-forward part. Gemma's have
more norms, bounded scores, and local layers, whose tokens see the nearest ones alone. Prompts [B, T, D] and
answers [B·A, U, D] go through a layer as two streams: an answer attends to its prompt's keys, which are computed once
whatever A is, and to its own. So an answer's tokens never meet padding between prompt and answer, and what is kept of a
prompt (its keys and values) serves training, scoring and generation alike.

Sources: RMS norm arXiv 1910.07467, rotary positions arXiv 2104.09864, grouped queries arXiv 2305.13245, gated
feed-forward arXiv 2002.05202, Gemma arXiv 2408.00118 and 2503.19786.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.models.layers import Stacking, activation, scanned, softmax, widen
from fedvlm_jax.models.text_shape import TextShape
from fedvlm_jax.utils.products import mix, score


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32 at least; cast to `dtype`, then scaled.

    A `shifted` one is scaled by 1 + scale, and cast then.
    """

    epsilon: float
    dtype: Any
    shifted: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.zeros if self.shifted else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        wide = widen(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        if self.shifted:
            return (wide * (1 + widen(scale))).astype(self.dtype)
        return wide.astype(self.dtype) * scale.astype(self.dtype)


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, [N, 1, T, d] each, the axis of heads broadcast."""

    cos: Array
    sin: Array


def make_rotation(positions: Int[Array, "N T *F"], width: int, theta: float, factor: float = 1.0) -> Rotation:
    """Make the rotary angles of positions, in float32 (arXiv 2104.09864, eq. 34, its halves side by side).

    A token has one position, or one for each of the F = width / 2 frequencies.

    >>> make_rotation(jnp.zeros((1, 3), jnp.int32), 4, 1e4).cos.shape
    (1, 1, 3, 4)
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width) / factor
    positions = positions[..., None] if positions.ndim == 2 else positions
    angles = positions[:, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], -1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "N H T d"], rotation: Rotation) -> Float[Array, "N H T d"]:
    """Turn pairs (i, i + d/2) of numbers by their position's angles.

    >>> rotate(jnp.asarray([[[[1.0, 0.0]]]]), Rotation(jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)))).tolist()
    [[[[0.0, 1.0]]]]
    """
    cos, sin = (part.astype(x.dtype) for part in rotation)
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin


class View(NamedTuple):
    """The place of a stream's tokens, and what they may look at.

    `own` and `prompt` are added to scores: `own` [N | 1, 1, 1, T | 1, T] of the stream's tokens among themselves, of a
    token that is generated [S] to those before it; `prompt` [B, 1, 1, 1, U | 1, T] of an answer's tokens to its
    prompt's. `place` is the place in the cache of the token that is generated, [] int32. `added` [K, B, T, D] is added
    to the stream after each of the first K layers. None is what the stream does not read.
    """

    rotation: Rotation
    own: Any = None
    prompt: Any = None
    place: Any = None
    added: Any = None


Views = tuple[View | None, View | None]
"""Of prompts and of answers."""


def cap(x: Array, bound: float | None) -> Array:
    """Keep numbers within a bound, smoothly (arXiv 2408.00118, section 2); None leaves them.

    >>> cap(jnp.asarray([0.0, 1e6]), 30.0).tolist()
    [0.0, 30.0]
    """
    return x if bound is None else bound * jnp.tanh(x / bound)


class KeysValues(NamedTuple):
    """Keys and values of a layer, [N, kv, T, d] each, or with an axis of beams [B, K, kv, S, d]."""

    key: Array
    value: Array


class Attention(nn.Module):
    """Projections of grouped-query attention; the products with keys and values are the layer's."""

    text: TextShape
    dtype: Any

    def setup(self) -> None:
        text = self.text
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(text.deviation))
        self.q_proj = dense(text.heads * text.head_width, text.qkv_bias)
        self.k_proj = dense(text.kv_heads * text.head_width, text.qkv_bias)
        self.v_proj = dense(text.kv_heads * text.head_width, text.qkv_bias)
        self.o_proj = dense(text.width, use_bias=False)
        if text.head_norms:
            self.q_norm, self.k_norm = (RmsNorm(text.epsilon, self.dtype, text.shifted_norms) for _ in "qk")

    def project(self, x: Float[Array, "N T D"], rotation: Rotation) -> tuple[Float[Array, "N kv G T d"], KeysValues]:
        """Queries, scaled and in G groups per head of keys; keys and values."""
        text = self.text

        def split(y: Array, heads: int) -> Array:
            return y.reshape(*y.shape[:-1], heads, text.head_width).swapaxes(1, 2)

        query, key = split(self.q_proj(x), text.heads), split(self.k_proj(x), text.kv_heads)
        if text.head_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, rotation) * (text.head_width**-0.5 if text.scale is None else text.scale)
        key = rotate(key, rotation)
        grouped = query.reshape(len(x), text.kv_heads, text.heads // text.kv_heads, *query.shape[2:])
        return grouped, KeysValues(key, split(self.v_proj(x), text.kv_heads))

    def join(self, mixed: Float[Array, "N kv G T d"]) -> Float[Array, "N T D"]:
        rows = mixed.transpose(0, 3, 1, 2, 4)
        return self.o_proj(rows.reshape(*rows.shape[:2], -1))


def _group(product: Callable[[Array, Array], Array], rows: Array, kept: Array) -> Array:
    """Multiply rows [N, kv, G, T, x] with [N, kv, S, y] as one product of G·T rows, so that keys are never repeated."""
    count, heads, groups, length, width = rows.shape
    return product(rows.reshape(count, heads, groups * length, width), kept).reshape(count, heads, groups, length, -1)


class Mlp(nn.Module):
    """Gated feed-forward part."""

    text: TextShape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        text, init = self.text, nn.initializers.normal(self.text.deviation)
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=init)
        gate = activation(text.activation)(dense(text.hidden, name="gate_proj")(x))
        return dense(text.width, name="down_proj")(gate * dense(text.hidden, name="up_proj")(x))


class Streams(NamedTuple):
    """What goes through the layers: prompts [B, T, D], answers [B·A, U, D], or one of both."""

    prompts: Array | None
    answers: Array | None


class Layer(nn.Module):
    """One layer over both streams.

    `prompt` holds the prompt's keys and values where there is no stream of prompts; `beams` those of what K beams have
    generated so far, and then answers are one token each, A = K and U = 1. `views` has one pair, or two and `local`
    says whether the layer takes the second: there is a mask for each kind of layer, not for each layer. `number` is the
    layer's, counted from 0, where a view adds something. Returns the streams, and the keys and values that the stream
    of prompts made, or else the beams' with the new token's in them.
    """

    text: TextShape
    dtype: Any

    @nn.compact
    def __call__(
        self, streams: Streams, prompt: KeysValues | None, beams: KeysValues | None, views: tuple[Views, ...],
        local: Array | None, number: Array | None,
    ) -> tuple[Streams, KeysValues | None]:  # fmt: skip
        norm = partial(RmsNorm, self.text.epsilon, self.dtype, self.text.shifted_norms)
        before, after = norm(name="input_layernorm"), norm(name="post_attention_layernorm")
        attention, mlp = Attention(self.text, self.dtype, name="self_attn"), Mlp(self.text, self.dtype, name="mlp")
        if self.text.norms_after:
            between, end = norm(name="pre_feedforward_layernorm"), norm(name="post_feedforward_layernorm")

            def finish(x: Array, mixed: Array) -> Array:
                x = x + after(attention.join(mixed))
                return x + end(mlp(between(x)))
        else:  # where nothing is normed after attention, Hugging Face calls the norm before `mlp` so

            def finish(x: Array, mixed: Array) -> Array:
                x = x + attention.join(mixed)
                return x + mlp(after(x))

        view, answer_view = views[0] if local is None else jax.tree.map(partial(jnp.where, local), views[1], views[0])
        (prompts, answers), kept = streams, beams
        if prompts is not None:
            assert view is not None
            query, prompt = attention.project(before(prompts), view.rotation)
            weights = softmax(self._score(query, prompt.key) + view.own, self.dtype)
            prompts, kept = finish(prompts, _group(mix, weights, prompt.value)), prompt
            if number is not None:
                last = len(view.added) - 1
                prompts = prompts + jnp.where(number <= last, view.added[jnp.minimum(number, last)], 0)
        if answers is not None:
            assert prompt is not None
            assert answer_view is not None
            query, new = attention.project(before(answers), answer_view.rotation)
            mixed, kept_beams = self._answer(query, new, prompt, beams, answer_view)
            answers, kept = finish(answers, mixed), kept if prompts is not None else kept_beams
        return Streams(prompts, answers), kept

    def _score(self, query: Float[Array, "N kv G T d"], key: Float[Array, "N kv S d"]) -> Float[Array, "N kv G T S"]:
        return cap(_group(score, query, key), self.text.score_cap)

    def _answer(
        self, query: Array, new: KeysValues, prompt: KeysValues, beams: KeysValues | None, view: View
    ) -> tuple[Float[Array, "N kv G U d"], KeysValues | None]:
        """Attend to the prompt's keys and to the answers' own in one softmax."""
        rows, (count, heads, groups, length, _) = len(prompt.key), query.shape
        answers = count // rows

        def fold(x: Array) -> Array:  # [B·A, kv, G, U, x] -> [B, kv, G, A·U, x], so that a prompt's keys serve all A
            split = x.reshape(rows, answers, heads, groups, length, -1).transpose(0, 2, 3, 1, 4, 5)
            return split.reshape(rows, heads, groups, answers * length, -1)

        def unfold(x: Array) -> Array:
            split = x.reshape(rows, heads, groups, answers, length, -1).transpose(0, 3, 1, 2, 4, 5)
            return split.reshape(count, heads, groups, length, -1)

        if beams is None:
            own = new
        else:
            beams = KeysValues(*(self._put(*pair, view.place) for pair in zip(beams, new, strict=True)))
            own = KeysValues(*(leaf.reshape(count, *leaf.shape[2:]) for leaf in beams))
        to_prompt = self._score(fold(query), prompt.key).reshape(rows, heads, groups, answers, length, -1)
        to_prompt = unfold((to_prompt + view.prompt).reshape(rows, heads, groups, answers * length, -1))
        weights = softmax(jnp.concatenate([to_prompt, self._score(query, own.key) + view.own], -1), self.dtype)
        told, said = jnp.split(weights, [prompt.key.shape[2]], -1)
        return unfold(_group(mix, fold(told), prompt.value)) + _group(mix, said, own.value), beams

    def _put(self, cache: Float[Array, "B K kv S d"], new: Float[Array, "N kv 1 d"], index: Array) -> Array:
        new = new.reshape(*cache.shape[:3], 1, cache.shape[-1]).astype(cache.dtype)
        return jax.lax.dynamic_update_slice_in_dim(cache, new, index, 3)


class CausalDecoder(nn.Module):
    """Token table, layers, last norm, and the head, which may be the table."""

    text: TextShape
    dtype: Any
    stacking: Stacking

    def setup(self) -> None:
        text, init = self.text, nn.initializers.normal(self.text.deviation)
        self.embed_tokens = nn.Embed(text.vocabulary, text.width, dtype=self.dtype, embedding_init=init)
        stack = scanned(Layer, text.layers, (0, 0, nn.broadcast, 0, 0), self.stacking)
        self.layers = stack(text, self.dtype)
        self.norm = RmsNorm(text.epsilon, self.dtype, text.shifted_norms)
        if not text.tied:
            self.lm_head = nn.Dense(text.vocabulary, use_bias=False, dtype=self.dtype, kernel_init=init)

    def embed(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Token embeddings; ids outside the vocabulary (an image token may be) are clamped, not NaN."""
        embedded = self.embed_tokens(jnp.clip(ids, 0, self.text.vocabulary - 1))
        return embedded if self.text.multiplier == 1 else embedded * jnp.asarray(self.text.multiplier, self.dtype)

    def run(
        self, streams: Streams, views: tuple[Views, ...],
        prompt: KeysValues | None = None, beams: KeysValues | None = None,
    ) -> tuple[Streams, KeysValues]:  # fmt: skip
        """Run all layers, with views for each of `TextShape.reaches`; keys and values have a leading axis L."""
        local = jnp.asarray(self.text.local_layers) if self.text.local else None
        adds = views[0][0] is not None and views[0][0].added is not None
        return self.layers(streams, prompt, beams, views, local, jnp.arange(self.text.layers) if adds else None)

    def head(self, x: Float[Array, "... D"]) -> tuple[Float[Array, "... D"], Float[Array, "... V"]]:
        """Norm the last layer's states; returns them and the logits that they give."""
        states = self.norm(x)
        logits = widen(self.embed_tokens.attend(states) if self.text.tied else self.lm_head(states))
        return states, cap(logits, self.text.logit_cap)
