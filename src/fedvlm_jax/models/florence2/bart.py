"""BART, the encoder-decoder of Florence-2 (arXiv 1910.13461): post-norm layers, learned positions offset by two.

Deviations: dropout and layer-drop are never applied (the model always runs as in inference). One token table serves
encoder, decoder and the output head. Layers are scanned, so every parameter of a layer has a leading axis L.

Several answers A to one prompt share its memory: they are separate rows in self-attention, [B·A, U, D], and one row
of queries in cross attention, [B, A·U, D], which thus needs one set of keys and values per prompt.

In decoding, the beams K of an example take the place of the target positions U: cross attention then needs one set of
keys and values per example whatever the number of beams, and every dense layer sees one matrix of rows.
"""

import math
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import layers
from fedvlm_jax.models.beam_search import Cache
from fedvlm_jax.models.layers import HIDDEN, Norm, Stacking

OFFSET = 2  # BART's position table starts with two rows that are never used


class TextModule(nn.Module):
    """A part of the language model; `text` is a transformers `BartConfig`, `dtype` what matmuls are computed in."""

    text: Any
    dtype: Any


class MultiHead(TextModule):
    """Multi-head attention with separate projections; in Florence-2 the last is called `out_proj`."""

    heads: int

    def setup(self) -> None:
        width, init = self.text.d_model, nn.initializers.normal(self.text.init_std)
        if width % self.heads:
            raise UserError(f"d_model {width} does not divide into {self.heads} attention heads")
        dense = partial(nn.Dense, width, dtype=self.dtype, kernel_init=init)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = dense(), dense(), dense(), dense()

    def _split(self, x: Float[Array, "B T D"]) -> Float[Array, "B H T d"]:
        return x.reshape(*x.shape[:-1], self.heads, -1).swapaxes(1, 2)

    def keys_values(self, memory: Float[Array, "B S D"]) -> tuple[Float[Array, "B H S d"], Float[Array, "B H S d"]]:
        return self._split(self.k_proj(memory)), self._split(self.v_proj(memory))

    def attend(self, x: Float[Array, "B T D"], key: Array, value: Array, bias: Array | None) -> Float[Array, "B T D"]:
        return self.out_proj(layers.dot_attention(self._split(self.q_proj(x)), key, value, bias))

    def __call__(self, x: Float[Array, "B T D"], bias: Array) -> Float[Array, "B T D"]:
        return self.attend(x, *self.keys_values(x), bias)

    def step(
        self, x: Float[Array, "B K D"], key: Float[Array, "B K H S d"], value: Float[Array, "B K H S d"], index: Array
    ) -> tuple[Float[Array, "B K D"], Array, Array]:
        """One new position `index` per beam: writes its key and value, attends to all positions up to it."""
        rows = (*x.shape[:-1], self.heads, 1, x.shape[-1] // self.heads)  # [B, K, H, 1, d]
        new_key, new_value = self.k_proj(x).reshape(rows), self.v_proj(x).reshape(rows)
        key = jax.lax.dynamic_update_slice_in_dim(key, new_key.astype(key.dtype), index, 3)
        value = jax.lax.dynamic_update_slice_in_dim(value, new_value.astype(value.dtype), index, 3)
        query = self.q_proj(x).reshape(rows) * rows[-1] ** -0.5
        scores = layers.multiply("bkhtd,bkhsd->bkhts", query, key)
        scores = jnp.where(jnp.arange(key.shape[3]) <= index, scores, HIDDEN)
        mixed = jnp.einsum("bkhts,bkhsd->bkhtd", layers.softmax(scores, value.dtype), value)
        return self.out_proj(mixed.reshape(*x.shape)), key, value


class TextLayer(TextModule):
    """A layer of either half: `fc1`, activation and `fc2` live in the layer itself, as in the checkpoint."""

    def _feed_forward(self, x: Float[Array, "B T D"], hidden: int) -> Float[Array, "B T D"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(self.text.init_std))
        wide = layers.activation(self.text.activation_function)(dense(hidden, name="fc1")(x))
        return Norm(self.dtype, name="final_layer_norm")(x + dense(self.text.d_model, name="fc2")(wide))


class EncoderLayer(TextLayer):
    """Self-attention and feed-forward, each followed by its norm."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], bias: Array) -> tuple[Float[Array, "B T D"], None]:
        attended = MultiHead(self.text, self.dtype, self.text.encoder_attention_heads, name="self_attn")(x, bias)
        x = Norm(self.dtype, name="self_attn_layer_norm")(x + attended)
        return self._feed_forward(x, self.text.encoder_ffn_dim), None


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
        multi_head = partial(MultiHead, self.text, self.dtype, self.text.decoder_attention_heads)
        inner, cross = multi_head(name="self_attn"), multi_head(name="encoder_attn")
        if cache is None:
            causal = jnp.where(jnp.tri(x.shape[1], dtype=bool), 0.0, HIDDEN)[None, None].astype(jnp.float32)
            attended = inner(x, causal)
        else:
            assert index is not None
            keys, values = cache.beams
            attended, keys, values = inner.step(x, keys, values, index)
            cache = cache._replace(beams=(keys, values))
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
        return self._feed_forward(x, self.text.decoder_ffn_dim), cache


class Half(TextModule):
    """Encoder or decoder: positions are added to token embeddings, then come a norm and the layers."""

    side: Literal["encoder", "decoder"]
    stacking: Stacking

    def setup(self) -> None:
        rows, init = self.text.max_position_embeddings + OFFSET, nn.initializers.normal(self.text.init_std)
        self.embed_positions = nn.Embed(rows, self.text.d_model, dtype=self.dtype, embedding_init=init)
        self.layernorm_embedding = Norm(self.dtype)
        # Of a layer's arguments only the decoder's cache has an axis of layers.
        layer, in_axes = EncoderLayer, (nn.broadcast,)
        if self.side == "decoder":
            layer, in_axes = DecoderLayer, (0, nn.broadcast, nn.broadcast, nn.broadcast)
        depth = getattr(self.text, f"{self.side}_layers")
        self.layers = layers.scanned(layer, depth, in_axes, self.stacking)(self.text, self.dtype)

    def __call__(self, embeddings: Array, positions: Int[Array, "*T"], *args: Any) -> tuple[Array, Cache | None]:
        if positions.size > self.text.max_position_embeddings:
            raise UserError(
                f"{positions.size} {self.side} tokens do not fit "
                f"max_position_embeddings={self.text.max_position_embeddings}"
            )
        x = self.layernorm_embedding(embeddings + self.embed_positions(positions + OFFSET))
        return self.layers(x, *args)


class Bart(TextModule):
    """The language model."""

    stacking: Stacking

    def setup(self) -> None:
        text, init = self.text, nn.initializers.normal(self.text.init_std)
        self.shared = nn.Embed(text.vocab_size, text.d_model, dtype=self.dtype, embedding_init=init)
        self.encoder = Half(text, self.dtype, "encoder", self.stacking)
        self.decoder = Half(text, self.dtype, "decoder", self.stacking)

    def embed(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Token embeddings; ids outside the vocabulary (an image token may be) are clamped, not NaN."""
        embedded = self.shared(jnp.clip(ids, 0, self.text.vocab_size - 1))
        return embedded * math.sqrt(self.text.d_model) if self.text.scale_embedding else embedded

    def encode(self, embeddings: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.encoder(embeddings, jnp.arange(embeddings.shape[1]), _padding_bias(attention_mask))[0]

    def decode(
        self, ids: Int[Array, "B *A U"], memory: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B *A U D"], Float[Array, "B *A U V"]]:
        """The decoder's last states, and the logits that they give."""
        embedded, positions = self.embed(ids.reshape(-1, ids.shape[-1])), jnp.arange(ids.shape[-1])
        hidden, _ = self.decoder(embedded, positions, None, memory, _padding_bias(attention_mask), None)
        logits = layers.widen(self.shared.attend(hidden))
        return hidden.reshape(*ids.shape, -1), logits.reshape(*ids.shape, -1)

    def step(
        self, ids: Int[Array, "B K"], index: Array, cache: Cache, memory: Array | None, attention_mask: Array
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K V"], Cache]:
        """One position: the decoder's last states, their logits, and the cache with that position in it."""
        hidden, kept = self.decoder(self.embed(ids), index, cache, memory, _padding_bias(attention_mask), index)
        assert kept is not None
        return hidden, layers.widen(self.shared.attend(hidden)), kept


def _padding_bias(attention_mask: Int[Array, "B T"]) -> Float[Array, "B 1 1 T"]:
    # Added to attention scores, so that positions where the mask is 0 are not attended to.
    return jnp.where(attention_mask[:, None, None, :] != 0, 0.0, HIDDEN).astype(jnp.float32)
