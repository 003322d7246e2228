"""Greedy and beam search over a decoder step, token for token as transformers 5.24 does them, and plain sampling.

Scores are processed in its order: no_repeat_ngram_size, min_length, min_new_tokens, forced BOS, forced EOS. Beam search
follows its vectorised search: 2 K candidates a step (more with several EOS tokens), scores divided by
length ** length_penalty, early_stopping True, False or "never".

Deviation: after EOS there is always the padding token (transformers' beam search fills with EOS where padding is 0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

FAR = -1e9  # the score of what must not win but may still be compared; transformers' own number


@dataclass(frozen=True)
class Settings:
    """Settings of generation; names and meanings are those of transformers' `GenerationConfig`.

    `ignored` names options of the folder by which tokens would be drawn: a search takes the likeliest.
    """

    num_beams: int
    decoder_start_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    forced_bos_token_id: int | None
    forced_eos_token_ids: tuple[int, ...]
    no_repeat_ngram_size: int
    min_length: int
    min_new_tokens: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    ignored: tuple[str, ...] = ()


class Cache(NamedTuple):
    """The part of earlier steps of decoding that later ones need."""

    beams: PyTree  # leaves [L, B, K, ...], rearranged with the hypotheses
    prompt: PyTree  # the same for all hypotheses of an example


Step = tuple[Float[Array, "B K D"], Float[Array, "B K V"], Cache]
"""Last states, the logits of the next token, and the cache."""


class Decoder(NamedTuple):
    """A model with its parameters, adapter and batch, as search uses it.

    Attributes:
        batch: B, examples.
        first: (ids [B, K]) -> the step after the prompt; the ids are the start token, for models that have one.
        step: (ids [B, K], position, cache) -> the step after these tokens, of which `position` came before.
    """

    batch: int
    first: Callable[[Array], Step]
    step: Callable[[Array, Array, Cache], Step]


@jax.custom_batching.custom_vmap
def _anywhere(flags: Bool[Array, "*any"]) -> Bool[Array, ""]:
    # Over all clients that `jax.vmap` runs side by side, so that their loop has one condition and one counter. With one
    # per client, vmap would copy the whole cache in every step to hold what has finished, and scatter into it.
    return jnp.any(flags)


@_anywhere.def_vmap
def _(size: int, batched: list[bool], flags: Array) -> tuple[Array, bool]:
    del size, batched
    return _anywhere(flags), False


def _is_one_of(ids: Array, wanted: tuple[int, ...]) -> Bool[Array, "..."]:
    return jnp.isin(ids, jnp.array(wanted, ids.dtype)) if wanted else jnp.zeros(ids.shape, bool)


def process_scores(
    scores: Float[Array, "B K V"], history: Int[Array, "B K N"], count: Array, settings: Settings
) -> Float[Array, "B K V"]:
    """Scores for the next token as the settings allow them; `history` holds `count` tokens, the start token first."""
    vocabulary = jnp.arange(scores.shape[-1])
    last = history.shape[-1] - 1
    size = settings.no_repeat_ngram_size
    if 0 < size <= history.shape[-1]:
        scores = _ban_repeats(scores, history, count, size)
    too_short = (count < settings.min_length) | (count - 1 < settings.min_new_tokens)
    scores = jnp.where(too_short & _is_one_of(vocabulary, settings.eos_token_ids), -jnp.inf, scores)
    if settings.forced_bos_token_id is not None:
        forced = jnp.where(vocabulary == settings.forced_bos_token_id, 0.0, -jnp.inf)
        scores = jnp.where(count == 1, forced, scores)
    if settings.forced_eos_token_ids:
        forced = jnp.where(_is_one_of(vocabulary, settings.forced_eos_token_ids), 0.0, -jnp.inf)
        scores = jnp.where(count == last, forced, scores)
    return scores


def _ban_repeats(scores: Array, history: Array, count: Array, size: int) -> Array:
    """Minus infinity for every token that would complete an n-gram that the history already has."""
    windows = history.shape[-1] - size + 1
    match = jnp.broadcast_to(jnp.arange(windows) + size <= count, (*history.shape[:2], windows))
    for offset in range(size - 1):
        tail = jax.lax.dynamic_index_in_dim(history, jnp.maximum(count + 1 - size + offset, 0), axis=2)
        match = match & (history[..., offset : offset + windows] == tail)
    tokens = history[..., size - 1 :]
    rows, beams = jnp.indices(tokens.shape[:2])
    banned = jnp.zeros(scores.shape, bool).at[rows[..., None], beams[..., None], tokens].max(match)
    return jnp.where(banned, -jnp.inf, scores)


def search_greedy(decoder: Decoder, length: int, settings: Settings) -> Int[Array, "..."]:
    """The likeliest token at every step, until every row has met EOS or is full."""

    def pick(scores: Array, count: Array) -> Array:
        del count
        # The first of the greatest, as two reductions: XLA does not vectorise `argmax` on a CPU.
        best, width = scores == scores.max(-1, keepdims=True), scores.shape[-1]
        return jnp.where(best, jnp.arange(width, dtype=jnp.int32), width - 1).min(-1)

    return _search(decoder, 1, length, settings, pick)[:, 0]


def draw_answers(
    decoder: Decoder, length: int, settings: Settings, keys: PRNGKeyArray, samples: int
) -> Int[Array, "B A U"]:
    """Answers drawn token by token from the model's own distribution, until every row has met EOS or is full.

    A row's draws depend on its key [B] alone, whatever stands beside it.
    """

    def pick(scores: Array, count: Array) -> Array:
        # The greatest of logits with Gumbel noise is a draw from their softmax.
        each = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, count), scores.shape[1:]))
        return jnp.argmax(scores.astype(jnp.float32) + each(keys), axis=-1).astype(jnp.int32)

    return _search(decoder, samples, length, settings, pick)


def _search(
    decoder: Decoder, rows: int, length: int, settings: Settings, pick: Callable[[Array, Array], Array]
) -> Int[Array, "B A U"]:
    """Continue so many rows per example with what `pick` makes of (scores [B, A, V], how many tokens there are)."""
    start = jnp.full((decoder.batch, rows, 1 + length), settings.pad_token_id, jnp.int32)
    start = start.at[..., 0].set(settings.decoder_start_token_id)

    def choose(logits: Array, history: Array, done: Array, count: Array) -> tuple[Array, Array]:
        token = pick(process_scores(logits, history, count, settings), count)
        token = jnp.where(done, settings.pad_token_id, token)
        history = jax.lax.dynamic_update_slice_in_dim(history, token[..., None], count, 2)
        return history, done | _is_one_of(token, settings.eos_token_ids)

    def body(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        count, history, done, cache = state
        last = jax.lax.dynamic_index_in_dim(history, count - 1, 2, keepdims=False)
        _, logits, cache = decoder.step(last, count - 1, cache)
        return count + 1, *choose(logits, history, done, count), cache

    _, logits, cache = decoder.first(start[..., 0])
    history, done = choose(logits, start, jnp.zeros((decoder.batch, rows), bool), jnp.int32(1))
    state = (jnp.int32(2), history, done, cache)
    return jax.lax.while_loop(lambda s: (s[0] <= length) & _anywhere(~s[2]), body, state)[1][..., 1:]


class _Beams(NamedTuple):
    """State of beam search: running hypotheses [B, K, ...] go on, finished ones are kept by their penalised score."""

    tokens: Array  # how many a hypothesis has so far, start token included
    running: Int[Array, "B K N"]
    running_scores: Float[Array, "B K"]
    finished: Int[Array, "B K N"]
    finished_scores: Float[Array, "B K"]
    is_finished: Bool[Array, "B K"]
    can_improve: Bool[Array, "B 1"]
    stuck: Bool[Array, ""]  # every candidate of the last step ended
    cache: Cache


def _take(array: Array, beams: Int[Array, "B M"]) -> Array:
    return jnp.take_along_axis(array, beams.reshape(*beams.shape, *[1] * (array.ndim - 2)), axis=1)


def search_beams(decoder: Decoder, length: int, settings: Settings) -> Int[Array, "..."]:
    """The hypothesis with the best score / length ** length_penalty among those that beam search finishes."""
    batch, beams = decoder.batch, settings.num_beams
    # So many candidates that K of them go on even where every end is among the best.
    keep = max(2, 1 + len(settings.eos_token_ids)) * beams
    early = settings.early_stopping is True

    def advance(state: _Beams, logits: Float[Array, "B K V"], cache: Cache) -> _Beams:
        count, width = state.tokens, logits.shape[-1]
        scores = process_scores(jax.nn.log_softmax(logits, -1), state.running, count, settings)
        scores = (scores + state.running_scores[..., None]).reshape(batch, -1)
        top, index = jax.lax.top_k(scores, keep)
        origin, token = index // width, (index % width).astype(jnp.int32)
        hypotheses = jax.lax.dynamic_update_slice_in_dim(_take(state.running, origin), token[..., None], count, 2)
        ends = _is_one_of(token, settings.eos_token_ids) | (count + 1 >= length + 1)

        running_scores, chosen = jax.lax.top_k(top + ends * FAR, beams)
        source = _take(origin, chosen)[None]

        def follow(leaf: Array) -> Array:
            return jnp.take_along_axis(leaf, source.reshape(*source.shape, *[1] * (leaf.ndim - 3)), 2)

        cache = cache._replace(beams=jax.tree.map(follow, cache.beams))

        newly = ends & (jnp.arange(keep) < beams)
        penalised = top / (count.astype(jnp.float32) ** settings.length_penalty)
        penalised = penalised + (jnp.all(state.is_finished, 1, keepdims=True) & early) * FAR
        penalised = penalised + ~state.can_improve * FAR + ~newly * FAR
        merged = jnp.concatenate([state.finished_scores, penalised], 1)
        finished_scores, best = jax.lax.top_k(merged, beams)
        finished = _take(jnp.concatenate([state.finished, hypotheses], 1), best)
        is_finished = _take(jnp.concatenate([state.is_finished, newly], 1), best)

        hoped = length if settings.early_stopping == "never" and settings.length_penalty > 0 else count
        possible = running_scores[:, :1] / (jnp.float32(hoped) ** settings.length_penalty)
        worst = jnp.where(is_finished, finished_scores.min(1, keepdims=True), FAR)
        can_improve = state.can_improve & jnp.any(possible > worst, 1, keepdims=True)
        running = _take(hypotheses, chosen)
        ended = (finished, finished_scores, is_finished, can_improve, jnp.all(ends))
        return _Beams(count + 1, running, running_scores, *ended, cache)

    def goes_on(state: _Beams) -> Bool[Array, ""]:
        return jnp.any(state.can_improve) & ~(jnp.all(state.is_finished) & early) & ~state.stuck

    def body(state: _Beams) -> _Beams:
        last = jax.lax.dynamic_index_in_dim(state.running, state.tokens - 1, 2, keepdims=False)
        return advance(state, *decoder.step(last, state.tokens - 1, state.cache)[1:])

    start = jnp.full((batch, beams, 1 + length), settings.pad_token_id, jnp.int32)
    start = start.at[..., 0].set(settings.decoder_start_token_id)
    _, logits, cache = decoder.first(start[..., 0])
    # Beams start equal, so all but the first start with a score that keeps them out.
    scores = jnp.zeros((batch, beams)).at[:, 1:].set(FAR)
    empty = jnp.full((batch, beams), FAR)
    none = jnp.zeros((batch, beams), bool)
    state = _Beams(jnp.int32(1), start, scores, start, empty, none, jnp.ones((batch, 1), bool), jnp.array(False), cache)
    return jax.lax.while_loop(goes_on, body, advance(state, logits, cache)).finished[:, 0, 1:]
