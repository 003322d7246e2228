"""Do a model's configuration, tokenizer and processor mean the same? Where they do not, pictures are silently lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Vlm
from fedvlm_jax.models.decoding.generate import check_settings, read_settings
from fedvlm_jax.models.florence2.processor import Processor
from fedvlm_jax.models.hub import read_vlm, resolve_folder
from fedvlm_jax.models.layers import USUAL, Stacking

__all__ = ["check_agreement", "check_generation", "open_model"]


def open_model(
    path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL
) -> tuple[Vlm, Processor]:
    """A model but for its weights, and its processor, once they are known to fit each other.

    Args and errors are those of `load_vlm`, `Processor.from_folder`, `check_generation` and `check_agreement`.
    """
    vlm = read_vlm(path, compute_dtype=compute_dtype, stacking=stacking)
    folder = resolve_folder(path, weights=False)
    check_generation(vlm, folder)
    processor = Processor.from_folder(folder)
    check_agreement(vlm, processor, folder)
    return vlm, processor


def check_generation(vlm: Vlm, folder: Path) -> None:
    """Refuse a folder whose answers cannot be generated as it says.

    Raises:
        UserError: naming the file and the option.
    """
    file = folder / "generation_config.json"
    file = file if file.is_file() else folder / "config.json"
    text = vlm.config.text_config
    try:
        settings = read_settings(vlm.config, vlm.generation_config)
        check_settings(settings, text.vocab_size)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if settings.decoder_start_token_id != text.decoder_start_token_id:
        raise UserError(
            f"{file}: answers begin after decoder_start_token_id={settings.decoder_start_token_id}, and in training "
            f"after {text.decoder_start_token_id}, as config.json says"
        )


def check_agreement(vlm: Vlm, processor: Processor, folder: Path) -> None:
    """Refuse a folder whose parts do not fit each other. Costs milliseconds: no weight is looked at.

    Args:
        vlm: what its configuration makes.
        processor: what its tokenizer and processor files make.
        folder: for the messages.

    Raises:
        UserError: the first disagreement, with both sides of it.
    """
    _check_tokens(vlm, processor, folder)
    try:
        tokens = vlm.image_tokens(*processor.size)
    except UserError as error:
        raise UserError(f"{folder}: {error}; the processor makes pictures of {processor.size} pixels") from None
    if tokens != processor.image_tokens:
        raise UserError(
            f"{folder}: the processor puts image_seq_length={processor.image_tokens} image tokens before a text, and "
            f"the tower of config.json makes {tokens} of its pictures of {processor.size} pixels"
        )
    positions = vlm.config.text_config.max_position_embeddings
    if tokens + 3 > positions:
        raise UserError(f"{folder}: {tokens} image tokens leave no room for a text in {positions} positions")


def _check_tokens(vlm: Vlm, processor: Processor, folder: Path) -> None:
    """Refuse ids that mean something else to the tokenizer, or nothing to the model."""
    asked, own = vlm.config.image_token_id, processor.image_token_id
    if asked != own:
        raise UserError(
            f"{folder}: the image token is {own} in the tokenizer and image_token_id={asked} in config.json: no "
            "picture would be seen"
        )
    vocabulary = vlm.config.text_config.vocab_size
    if processor.largest_id >= vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has a token {processor.largest_id}, and the vocabulary of config.json ends with "
            f"{vocabulary - 1}: is the tokenizer another model's?"
        )
    settings = read_settings(vlm.config, vlm.generation_config)
    if processor.eos_token_id not in settings.eos_token_ids:
        raise UserError(
            f"{folder}: answers end with token {processor.eos_token_id} in the tokenizer, and with "
            f"{list(settings.eos_token_ids)} in the configuration: none would ever end"
        )
    first = int(processor.answers(["a"], 4)[0, 0])
    if settings.forced_bos_token_id not in (None, first):
        raise UserError(
            f"{folder}: generated answers begin with forced_bos_token_id={settings.forced_bos_token_id}, and the "
            f"tokenizer begins those that are learnt with {first}: is the post_processor of tokenizer.json whole?"
        )
    for name, number in (("pad", settings.pad_token_id), ("forced BOS", settings.forced_bos_token_id)):
        if number is not None and number not in processor.framing:
            raise UserError(
                f"{folder}: the {name} token of generation is {number}, which in the tokenizer is a token of texts"
            )
