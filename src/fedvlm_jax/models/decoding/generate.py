"""Generation: settings from transformers' `GenerationConfig`, and one jitted function from a batch to answers.

Keys and values of the encoder's memory are computed once, in the first step; later steps see the cache only. The beams
of an example are folded into the decoder's position axis (see `bart`). Tokens equal those of transformers 5.23's
`generate` (see `search`); an option that would change them and is not implemented is refused, never ignored.

Under `jax.vmap` over clients the loop runs until the slowest client has finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.decoding.search import Decoder, Settings, search_beams, search_greedy
from fedvlm_jax.models.florence2.bart import Cache, empty_cache
from fedvlm_jax.utils import tree

Amend = Callable[[Any, Array, Array], Array]
"""(recalled, the decoder's last states [B, K, D], logits [B, K, V]) -> logits to search with."""

# Options of GenerationConfig that would change the tokens and are not implemented, with their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
}


MOST_BEAMS = 64
"""More beams than anybody searches by."""


def resolve_config(config: Any, generation_config: Any | None) -> Any:
    """The `GenerationConfig` given, or what transformers makes of the model's configuration without one."""
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(config) if generation_config is None else generation_config


def read_settings(config: Any, generation_config: Any) -> Settings:
    """Settings of a `GenerationConfig`, with the text configuration's token ids where it has none.

    Raises:
        UserError: for an option that would change the tokens and is not implemented.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if not any(value is known or value == known for known in neutral):
            raise UserError(f"generation option {name}={value!r} is not implemented; set it to {neutral[-1]!r}")
    text = config.text_config

    def token(name: str) -> Any:
        value = getattr(generation_config, name, None)
        return getattr(text, name, None) if value is None else value

    eos = _as_ids(token("eos_token_id"))
    pad = token("pad_token_id")
    start = token("decoder_start_token_id")
    if pad is None and not eos:
        raise UserError("generation needs a pad_token_id or an eos_token_id; the configuration has neither")
    return Settings(
        num_beams=generation_config.num_beams or 1,
        decoder_start_token_id=token("bos_token_id") if start is None else start,
        pad_token_id=eos[0] if pad is None else pad,
        eos_token_ids=eos,
        forced_bos_token_id=generation_config.forced_bos_token_id,
        forced_eos_token_ids=_as_ids(generation_config.forced_eos_token_id),
        no_repeat_ngram_size=generation_config.no_repeat_ngram_size or 0,
        min_length=generation_config.min_length or 0,
        min_new_tokens=generation_config.min_new_tokens or 0,
        length_penalty=1.0 if generation_config.length_penalty is None else generation_config.length_penalty,
        early_stopping=generation_config.early_stopping or False,
    )


def check_settings(settings: Settings, vocabulary: int) -> None:
    """Refuse settings of wrong types, tokens outside of the vocabulary, and answers that end where they begin.

    Raises:
        UserError: naming the option, as transformers calls it.
    """
    tokens: dict[str, tuple[Any, ...]] = {  # as a file has them, whatever their types should be
        "decoder_start_token_id": (settings.decoder_start_token_id,),
        "pad_token_id": (settings.pad_token_id,),
        "eos_token_id": settings.eos_token_ids,
        "forced_bos_token_id": () if settings.forced_bos_token_id is None else (settings.forced_bos_token_id,),
        "forced_eos_token_id": settings.forced_eos_token_ids,
    }
    bounds: dict[str, tuple[tuple[Any, ...], int, int]] = {
        name: (values, 0, vocabulary - 1) for name, values in tokens.items()
    }
    bounds |= {"num_beams": ((settings.num_beams,), 1, MOST_BEAMS)}
    for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens"):
        bounds[name] = ((getattr(settings, name),), 0, 2**20)
    for name, (values, least, most) in bounds.items():
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
    if settings.forced_bos_token_id in settings.eos_token_ids:
        raise UserError(
            f"forced_bos_token_id is {settings.forced_bos_token_id}, which ends answers too (eos_token_id "
            f"{list(settings.eos_token_ids)}): every answer would be empty"
        )
    penalty: Any = settings.length_penalty
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not math.isfinite(penalty):
        raise UserError(f"length_penalty is {penalty!r}, expected a number")
    early: Any = settings.early_stopping
    if early not in (True, False, "never"):
        raise UserError(f"early_stopping is {early!r}, expected true, false or 'never'")


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def make_generate(
    config: Any, module: Any, injected: Callable[..., Any], encode: Callable[..., Array], generation_config: Any
) -> Callable[..., Array]:
    """The `generate` of a Florence-2 module.

    Args:
        config: transformers' `Florence2Config`.
        module: the linen module.
        injected: its `apply` with an adapter argument.
        encode: the record's.
        generation_config: transformers' `GenerationConfig`.
    """

    @partial(jax.jit, static_argnames=("length", "settings", "amend"))
    def run(
        params: Any, adapter: Any, batch: Any, recalled: Any, length: int, settings: Settings, amend: Amend | None
    ) -> Array:
        memory = encode(params, adapter, batch)
        mask = batch["attention_mask"]
        later = part(adapter, lambda path: decoding(path) and not _of_memory(path))
        cache = empty_cache(config.text_config, memory.shape[0], settings.num_beams, length, module.dtype)

        def read(states: Array, logits: Array, cache: Cache) -> tuple[Array, Cache]:
            return logits if amend is None else amend(recalled, states, logits), cache

        def first(ids: Array) -> tuple[Array, Cache]:
            own = part(adapter, decoding)
            return read(*injected(params, own, ids, jnp.int32(0), cache, memory, mask, method="step"))

        def step(ids: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
            return read(*injected(params, later, ids, position, cache, None, mask, method="step"))

        decoder = Decoder(memory.shape[0], first, step)
        search = search_greedy if settings.num_beams == 1 else search_beams
        return search(decoder, length, settings)

    def generate(
        params: Any,
        adapter: Any,
        batch: Any,
        max_tokens: int,
        *,
        num_beams: int | None = None,
        amend: Amend | None = None,
        recalled: Any = None,
        **options: Any,
    ) -> Int[Array, "B U"]:
        """Answers to a batch, without the decoder's start token.

        Args:
            params: of the base.
            adapter: or None.
            batch: as `Vlm` describes it; labels are ignored.
            max_tokens: how many tokens at most, forced BOS and EOS included: transformers' `max_new_tokens`.
            num_beams: 1 for greedy search; None for what the generation configuration says.
            amend: changes the logits at every step; compiled once per function, so it must not be made anew each time.
            recalled: the arrays that `amend` reads.
            **options: other fields of `Settings` in place of the generation configuration's: forced_bos_token_id,
                forced_eos_token_ids, no_repeat_ngram_size, min_length, min_new_tokens, length_penalty, early_stopping.

        Returns:
            int32 [B, max_tokens]. Row by row: the tokens that `transformers`' `generate` returns after the start token,
            EOS included where one was produced, then the padding token. For beam search, the best hypothesis.

        Raises:
            UserError: for an option that is not known or not implemented, or a max_tokens the positions do not hold.
        """
        settings = read_settings(config, generation_config)
        if unknown := options.keys() - {field.name for field in fields(Settings)}:
            raise UserError(f"generate does not know {', '.join(sorted(unknown))}")
        settings = replace(settings, **options)
        settings = settings if num_beams is None else replace(settings, num_beams=num_beams)
        if max_tokens < 1 or settings.num_beams < 1:
            raise UserError(f"max_tokens={max_tokens} and num_beams={settings.num_beams} must both be at least 1")
        batch = {name: batch[name] for name in batch if name not in ("labels", "decoder_input_ids")}
        return run(params, adapter, batch, recalled, max_tokens, settings, amend)

    return generate


def encoding(path: str) -> bool:
    """Is the leaf at this path of an adapter read on the way to the memory?"""
    return not path.startswith("language_model/decoder/")


def decoding(path: str) -> bool:
    """Is it read on the way from there?"""
    return path.startswith(("language_model/decoder/", "language_model/shared/"))


def _of_memory(path: str) -> bool:
    """Read in the first step only: what makes the cross keys and values."""
    return "/encoder_attn/k_proj/" in path or "/encoder_attn/v_proj/" in path


def part(adapter: Any, belongs: Callable[[str], bool]) -> Any:
    """The part of the adapter that one call reads: a leaf that a call never reads is an error in `lora.inject`."""
    return tree.partition(adapter, belongs)[0] or None if adapter else None
