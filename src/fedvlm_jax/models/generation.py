"""Generation: settings from transformers' `GenerationConfig`, and one jitted function from a batch to answers.

Tokens equal those of transformers 5.24's `generate` (see `beam_search`); an option that would change them and is not
implemented is refused. Sampling alone is ignored where a family says so, since published models that chat ask for it
and evaluation searches; the settings name what is. Under `jax.vmap` over clients the loop runs until the slowest has
finished.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Batch, Params
from fedvlm_jax.models.beam_search import Decoder, Settings, Step, draw_answers, search_beams, search_greedy
from fedvlm_jax.models.folder_files import require_integer

Amend = Callable[[PyTree, Array, Array], Array]
"""(datastore, last states [B, K, D], logits [B, K, V]) -> logits to search with."""

# Options of GenerationConfig that would change the tokens and are not implemented, with their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (None, 1.0)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "penalty_alpha"), (None, 0)),
    **dict.fromkeys(("guidance_scale", "num_return_sequences", "num_beam_groups"), (None, 1)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "sequence_bias", "constraints", "stop_strings"), (None,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "max_time"), (None,)),
    "exponential_decay_length_penalty": (None,),
}
UNFORCED: dict[str, Any] = {
    "forced_bos_token_id": None, "forced_eos_token_ids": (), "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0,
}  # fmt: skip
"""Settings with which the logits are what the model says."""
MOST_BEAMS = 64  # more than anybody searches by
_SAMPLING = (
    "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def read_settings(
    generation_config: Any, text: Any, vocabulary: int, *, ignore_sampling: bool = False, start: int | None = None
) -> Settings:
    """Settings of transformers' `GenerationConfig`; `text` has as attributes the token ids that it leaves open.

    Args:
        ignore_sampling: a configuration that draws tokens is read as one that takes the likeliest, without penalties.
        start: what stands in the place of a start token for models that have none.

    Raises:
        UserError: for an option that would change the tokens and is not implemented, or for values of wrong types,
            tokens outside of the vocabulary, and answers that end where they begin.
    """
    ignored: tuple[str, ...] = ()
    if ignore_sampling and generation_config.do_sample is True:
        asked = {name: getattr(generation_config, name, None) for name in _SAMPLING}
        others = (name for name, value in asked.items() if value not in (None, *_NEUTRAL.get(name, ())))
        ignored = ("do_sample", *others)
    for name, neutral in _NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if name not in ignored and not any(value is known or value == known for known in neutral):
            raise UserError(f"generation option {name}={value!r} is not implemented; set it to {neutral[-1]!r}")

    def token(name: str) -> Any:
        value = getattr(generation_config, name, None)
        return getattr(text, name, None) if value is None else value

    eos, pad = _as_ids(token("eos_token_id")), token("pad_token_id")
    start = token("decoder_start_token_id") if start is None else start
    if pad is None and not eos:
        raise UserError("generation needs a pad_token_id or an eos_token_id; the configuration has neither")
    settings = Settings(
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
        ignored=ignored,
    )
    _check_settings(settings, vocabulary)
    return settings


def check_generation(options: Any) -> None:
    """Refuse what counts the prompt's tokens too in a decoder-only model of transformers, and here would not.

    Raises:
        UserError: naming the option.
    """
    for name in ("no_repeat_ngram_size", "min_length", "forced_bos_token_id"):
        if value := getattr(options, name, None):
            raise UserError(f"generation option {name}={value!r} is not implemented for a decoder-only model; leave it")


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_settings(settings: Settings, vocabulary: int) -> None:
    forced = settings.forced_bos_token_id
    # Values are as a file has them, whatever their types should be.
    tokens: dict[str, tuple[Any, ...]] = {
        "decoder_start_token_id": (settings.decoder_start_token_id,),
        "pad_token_id": (settings.pad_token_id,),
        "eos_token_id": settings.eos_token_ids,
        "forced_bos_token_id": () if forced is None else (forced,),
        "forced_eos_token_id": settings.forced_eos_token_ids,
    }
    for name, values in tokens.items():
        for value in values:
            require_integer(name, value, 0, vocabulary - 1)
    require_integer("num_beams", settings.num_beams, 1, MOST_BEAMS)
    for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens"):
        require_integer(name, getattr(settings, name), 0, 2**20)
    if forced in settings.eos_token_ids:
        raise UserError(
            f"forced_bos_token_id is {forced}, which ends answers too (eos_token_id "
            f"{list(settings.eos_token_ids)}): every answer would be empty"
        )
    penalty: Any = settings.length_penalty
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not math.isfinite(penalty):
        raise UserError(f"length_penalty is {penalty!r}, expected a number")
    early: Any = settings.early_stopping
    if early not in (True, False, "never"):
        raise UserError(f"early_stopping is {early!r}, expected true, false or 'never'")


def make_generate(
    read: Callable[[], Settings], open_decoder: Callable[[Params, PyTree, Batch, int, int], Decoder]
) -> Callable[..., Array]:
    """Make the `generate` of a model.

    `read` gives the settings where its arguments do not say otherwise; `open_decoder`, of (params, adapter, batch,
    beams, length), the decoder with room for so many tokens.
    """

    @partial(jax.jit, static_argnames=("length", "settings", "amend"))
    def run(
        params: Params, adapter: PyTree, batch: Batch, datastore: PyTree, length: int, settings: Settings,
        amend: Amend | None, keys: PRNGKeyArray | None,
    ) -> Array:  # fmt: skip
        decoder = open_decoder(params, adapter, batch, settings.num_beams, length)

        def amended(step: Callable[..., Step], *args: Any) -> Step:
            states, logits, cache = step(*args)
            return states, logits if amend is None else amend(datastore, states, logits), cache

        first, step = partial(amended, decoder.first), partial(amended, decoder.step)
        decoder = Decoder(decoder.batch, first, step)
        if keys is not None:
            return draw_answers(decoder, length, settings, keys, settings.num_beams)
        search = search_greedy if settings.num_beams == 1 else search_beams
        return search(decoder, length, settings)

    def generate(
        params: Params, adapter: PyTree, batch: Batch, max_tokens: int, *, num_beams: int | None = None,
        amend: Amend | None = None, datastore: PyTree = None, samples: int = 0, keys: PRNGKeyArray | None = None,
        **options: Any,
    ) -> Int[Array, "B U"] | Int[Array, "B A U"]:  # fmt: skip
        """Answers to a batch, without the decoder's start token.

        Args:
            params, adapter, batch: as `Vlm` describes them; labels are ignored.
            max_tokens: how many tokens at most, forced BOS and EOS included: transformers' `max_new_tokens`.
            num_beams: 1 for greedy search; None for what the generation configuration says.
            amend: changes the logits at every step; compiled once per function, so it must not be made anew each time.
            datastore: the arrays that `amend` reads.
            samples, keys: in place of a search, draw so many answers to each prompt, with a key for each of them [B];
                from the model's own distribution, with nothing forced or banned. No other option is read then.
            **options: other fields of `Settings` in place of the generation configuration's: forced_bos_token_id,
                forced_eos_token_ids, no_repeat_ngram_size, min_length, min_new_tokens, length_penalty, early_stopping.

        Returns:
            int32 [B, max_tokens]. Row by row: the tokens that `transformers`' `generate` returns after the start token,
            EOS included where one was produced, then the padding token. For beam search, the best hypothesis. Of
            `samples`, A of them, int32 [B, A, max_tokens].

        Raises:
            UserError: for an option that is not known or not implemented, or a max_tokens the positions do not hold.
        """
        settings = read()
        if unknown := options.keys() - {field.name for field in fields(Settings)}:
            raise UserError(f"generate does not know {', '.join(sorted(unknown))}")
        if num_beams is not None:
            options["num_beams"] = num_beams
        settings = replace(settings, **options) if keys is None else replace(settings, num_beams=samples, **UNFORCED)
        if max_tokens < 1 or settings.num_beams < 1:
            raise UserError(f"max_tokens={max_tokens} and num_beams={settings.num_beams} must both be at least 1")
        # What is not read would only compile the program anew for its shape.
        batch = {name: batch[name] for name in batch if name not in ("labels", "decoder_input_ids")}
        return run(params, adapter, batch, datastore, max_tokens, settings, amend, keys)

    return generate
