"""BART, the encoder-decoder of Florence-2 (arXiv 1910.13461): post-norm layers, learned positions offset by two.

Deviations: dropout and layer-drop are never applied (the model always runs as in inference). One token table serves
encoder, decoder and the output head. Layers are scanned, so every parameter of a layer has a leading axis L.

Several answers A to one prompt share its memory: they are rows of their own in self-attention, [B·A, U, D], and one row
of queries in cross attention, [B, A·U, D], which thus needs one set of keys and values per prompt.

In decoding, the beams K of an example take the place of the target positions U: cross attention then needs one set of
keys and values per example whatever the number of beams, and every dense layer sees one matrix of rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.layers import (
    HIDDEN,
    USUAL,
    Norm,
    Stacking,
    activation,
    dot_attention,
    multiply,
    scanned,
    softmax,
    widen,
)
from fedvlm_jax.models.search import Cache

OFFSET = 2  # BART's position table starts with two rows that are never used


def padding_bias(attention_mask: Int[Array, "B T"]) -> Float[Array, "B 1 1 T"]:
    """What is added to attention scores so that positions where the mask is 0 are not attended to."""
    return jnp.where(attention_mask[:, None, None, :] != 0, 0.0, HIDDEN).astype(jnp.float32)


def causal_bias(length: int) -> Float[Array, "1 1 U U"]:
    """What is added to attention scores so that no position sees a later one."""
    return jnp.where(jnp.tri(length, dtype=bool), 0.0, HIDDEN)[None, None].astype(jnp.float32)


class MultiHead(nn.Module):
    """Multi-head attention with separate projections; in Florence-2 the last is called `out_proj`."""

    width: int
    heads: int
    std: float
    dtype: Any

    def setup(self) -> None:
        if self.width % self.heads:
            raise UserError(f"d_model {self.width} does not divide into {self.heads} attention heads")
        dense = partial(nn.Dense, self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(self.std))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = dense(), dense(), dense(), dense()

    def _split(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T d"]:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads).swapaxes(1, 2)

    def keys_values(self, memory: Float[Array, "B S D"]) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S d"]]:
        return self._split(self.k_proj(memory)), self._split(self.v_proj(memory))

    def attend(self, x: Float[Array, "B T D"], key: Array, value: Array, bias: Array | None) -> Float[Array, "B T D"]:
        return self.out_proj(dot_attention(self._split(self.q_proj(x)), key, value, bias))

    def __call__(self, x: Float[Array, "B T D"], memory: Float[Array, "B S D"], bias: Array) -> Float[Array, "B T D"]:
        return self.attend(x, *self.keys_values(memory), bias)

    def step(
        self, x: Float[Array, "B K D"], key: Float[Array, "B K H S d"], value: Float[Array, "B K H S d"], index: Array
    ) -> tuple[Float[Array, "B K D"], Array, Array]:
        """One new position `index` per beam: writes its key and value, attends to all positions up to it."""
        rows = (*x.shape[:-1], self.heads, 1, self.width // self.heads)  # [B, K, H, 1, d]
        new_key, new_value = self.k_proj(x).reshape(rows), self.v_proj(x).reshape(rows)
        key = jax.lax.dynamic_update_slice_in_dim(key, new_key.astype(key.dtype), index, 3)
        value = jax.lax.dynamic_update_slice_in_dim(value, new_value.astype(value.dtype), index, 3)
        query = self.q_proj(x).reshape(rows) * rows[-1] ** -0.5
        scores = multiply("bkhtd,bkhsd->bkhts", query, key)
        scores = jnp.where(jnp.arange(key.shape[3]) <= index, scores, HIDDEN)
        mixed = jnp.einsum("bkhts,bkhsd->bkhtd", softmax(scores, value.dtype), value)
        return self.out_proj(mixed.reshape(*x.shape)), key, value


class TextLayer(nn.Module):
    """A layer of either half: `fc1`, activation and `fc2` live in the layer itself, as in the checkpoint."""

    text: Any
    dtype: Any

    def _feed_forward(self, x: Float[Array, "B T D"], hidden: int) -> Float[Array, "B T D"]:
        init = nn.initializers.normal(self.text.init_std)
        wide = nn.Dense(hidden, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        wide = activation(self.text.activation_function)(wide)
        return nn.Dense(self.text.d_model, dtype=self.dtype, kernel_init=init, name="fc2")(wide)

    def _heads(self, heads: int, name: str) -> MultiHead:
        return MultiHead(self.text.d_model, heads, self.text.init_std, self.dtype, name=name)


class EncoderLayer(TextLayer):
    """Self-attention and feed-forward, each followed by its norm."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], bias: Array) -> tuple[Float[Array, "B T D"], None]:
        attended = self._heads(self.text.encoder_attention_heads, "self_attn")(x, x, bias)
        x = Norm(self.dtype, name="self_attn_layer_norm")(x + attended)
        fed = self._feed_forward(x, self.text.encoder_ffn_dim)
        return Norm(self.dtype, name="final_layer_norm")(x + fed), None


class DecoderLayer(TextLayer):
    """Causal self-attention, cross-attention and feed-forward, each followed by its norm.

    Without a cache: x [B·A, U, D] are all target positions, of A answers to each prompt of `memory`. With one:
    x [B, K, D] is one position of K beams, and where the cache has no cross keys yet they are computed from `memory`
    and returned with it.
    """

    @nn.compact
    def __call__(
        self, x: Array, cache: Cache | None, memory: Array | None, bias: Array, index: Array | None
    ) -> tuple[Array, Cache | None]:
        own = self._heads(self.text.decoder_attention_heads, "self_attn")
        cross = self._heads(self.text.decoder_attention_heads, "encoder_attn")
        if cache is None:
            attended = own(x, x, causal_bias(x.shape[1]))
        else:
            assert index is not None
            key, value = cache.beams
            attended, key, value = own.step(x, key, value, index)
            cache = cache._replace(beams=(key, value))
        x = Norm(self.dtype, name="self_attn_layer_norm")(x + attended)
        if cache is None or cache.prompt is None:
            assert memory is not None
            key, value = cross.keys_values(memory)
            cache = None if cache is None else cache._replace(prompt=(key, value))
        else:
            key, value = cache.prompt
        queries = x.reshape(key.shape[0], -1, x.shape[-1])
        attended = cross.attend(queries, key, value, bias).reshape(x.shape)
        x = Norm(self.dtype, name="encoder_attn_layer_norm")(x + attended)
        fed = self._feed_forward(x, self.text.decoder_ffn_dim)
        return Norm(self.dtype, name="final_layer_norm")(x + fed), cache


class Positions(nn.Module):
    """What encoder and decoder do to embeddings before their layers: add positions, then norm. Held by both."""

    text: Any
    dtype: Any
    stacking: Stacking = USUAL

    def setup(self) -> None:
        rows, init = self.text.max_position_embeddings + OFFSET, nn.initializers.normal(self.text.init_std)
        self.embed_positions = nn.Embed(rows, self.text.d_model, dtype=self.dtype, embedding_init=init)
        self.layernorm_embedding = Norm(self.dtype)

    def _place(self, embeddings: Array, positions: Array) -> Array:
        return self.layernorm_embedding(embeddings + self.embed_positions(positions + OFFSET))

    def _check_length(self, length: int, what: str) -> None:
        if length > self.text.max_position_embeddings:
            raise UserError(f"{length} {what} do not fit max_position_embeddings={self.text.max_position_embeddings}")


class Encoder(Positions):
    """Token embeddings [B, T, D] to memory [B, T, D]."""

    def setup(self) -> None:
        super().setup()
        build = scanned(EncoderLayer, self.text.encoder_layers, (nn.broadcast,), self.stacking)
        self.layers = build(self.text, self.dtype)

    def __call__(self, embeddings: Float[Array, "B T D"], bias: Array) -> Float[Array, "B T D"]:
        self._check_length(embeddings.shape[1], "encoder tokens")
        x, _ = self.layers(self._place(embeddings, jnp.arange(embeddings.shape[1])), bias)
        return x


class Decoder(Positions):
    """Target embeddings and memory to hidden states; with a cache, one position at a time."""

    def setup(self) -> None:
        super().setup()
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = scanned(DecoderLayer, self.text.decoder_layers, in_axes, self.stacking)(self.text, self.dtype)

    def __call__(self, embeddings: Float[Array, "N U D"], memory: Array, bias: Array) -> Float[Array, "N U D"]:
        self._check_length(embeddings.shape[1], "decoder tokens")
        x, _ = self.layers(self._place(embeddings, jnp.arange(embeddings.shape[1])), None, memory, bias, None)
        return x

    def step(
        self, embeddings: Float[Array, "B K D"], index: Array, cache: Cache, memory: Array | None, bias: Array
    ) -> tuple[Float[Array, "B K D"], Cache]:
        return self.layers(self._place(embeddings, index), cache, memory, bias, index)


class Bart(nn.Module):
    """The language model: `text` is a transformers `BartConfig`."""

    text: Any
    dtype: Any = jnp.float32
    stacking: Stacking = USUAL

    def setup(self) -> None:
        text, init = self.text, nn.initializers.normal(self.text.init_std)
        self.shared = nn.Embed(text.vocab_size, text.d_model, dtype=self.dtype, embedding_init=init)
        self.encoder = Encoder(text, self.dtype, self.stacking)
        self.decoder = Decoder(text, self.dtype, self.stacking)

    def embed(self, ids: Int[Array, ...]) -> Float[Array, "... D"]:
        """Token embeddings; ids outside the vocabulary (an image token may be) are clamped, not NaN."""
        embedded = self.shared(jnp.clip(ids, 0, self.text.vocab_size - 1))
        return embedded * math.sqrt(self.text.d_model) if self.text.scale_embedding else embedded

    def encode(self, embeddings: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.encoder(embeddings, padding_bias(attention_mask))

    def decode(
        self, ids: Int[Array, "B *A U"], memory: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B *A U D"], Float[Array, "B *A U V"]]:
        """The decoder's last states, and the logits that they give."""
        hidden = self.decoder(self.embed(ids.reshape(-1, ids.shape[-1])), memory, padding_bias(attention_mask))
        logits = widen(self.shared.attend(hidden))
        return hidden.reshape(*ids.shape, -1), logits.reshape(*ids.shape, -1)

    def step(
        self, ids: Int[Array, "B K"], index: Array, cache: Cache, memory: Array | None, attention_mask: Array
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K V"], Cache]:
        """One position: the decoder's last states, their logits, and the cache with that position in it."""
        hidden, cache = self.decoder.step(self.embed(ids), index, cache, memory, padding_bias(attention_mask))
        return hidden, widen(self.shared.attend(hidden)), cache


def empty_cache(text: Any, batch: int, beams: int, length: int, dtype: Any) -> Cache:
    """Make room for keys and values [L, B, K, H, S, d] of `length` positions.

    Those of the memory [L, B, H, T, d] are filled in by the first step.

    Raises:
        UserError: where the model has fewer positions.
    """
    if length > text.max_position_embeddings:
        raise UserError(f"{length} generated tokens do not fit max_position_embeddings={text.max_position_embeddings}")
    heads = text.decoder_attention_heads
    shape = (text.decoder_layers, batch, beams, heads, length, text.d_model // heads)
    return Cache((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), None)
