"""Do a model's configuration, tokenizer and processor mean the same? Where they do not, pictures are silently lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Processor, Vlm
from fedvlm_jax.models.hub import open_processor, read_vlm, resolve_folder
from fedvlm_jax.models.layers import USUAL, Stacking
from fedvlm_jax.models.search import Settings


def open_model(
    path: str | Path, *, compute_dtype: Any = jnp.float32, stacking: Stacking = USUAL
) -> tuple[Vlm, Processor]:
    """A model but for its weights, and its processor; arguments as `load_vlm` takes them.

    Raises:
        UserError: a file of it cannot be read, or two of them disagree.
    """
    vlm = read_vlm(path, compute_dtype=compute_dtype, stacking=stacking)
    folder = resolve_folder(path, weights=False)
    file = folder / "generation_config.json"
    try:
        settings = vlm.settings()
    except UserError as error:
        raise UserError(f"{file if file.is_file() else folder / 'config.json'}: {error}") from None
    processor = open_processor(folder)
    check_agreement(vlm, settings, processor, folder)
    return vlm, processor


def check_agreement(vlm: Vlm, settings: Settings, processor: Processor, folder: Path) -> None:
    """Refuse a `folder` whose configuration and processor do not fit each other; no weight is looked at.

    Raises:
        UserError: the first disagreement, with both sides of it.
    """
    _check_tokens(vlm, settings, processor, folder)
    try:
        tokens = vlm.image_tokens(*processor.size)
    except UserError as error:
        raise UserError(f"{folder}: {error}; the processor makes pictures of {processor.size} pixels") from None
    if tokens != processor.image_tokens:
        raise UserError(
            f"{folder}: the processor puts image_seq_length={processor.image_tokens} image tokens before a text, and "
            f"the tower of config.json makes {tokens} of its pictures of {processor.size} pixels"
        )
    if tokens + 3 > vlm.positions:
        raise UserError(f"{folder}: {tokens} image tokens leave no room for a text in {vlm.positions} positions")


def _check_tokens(vlm: Vlm, settings: Settings, processor: Processor, folder: Path) -> None:
    """Refuse ids that mean something else to the tokenizer, or nothing to the model."""
    if vlm.image_token_id != processor.image_token_id:
        raise UserError(
            f"{folder}: the image token is {processor.image_token_id} in the tokenizer and "
            f"image_token_id={vlm.image_token_id} in config.json: no picture would be seen"
        )
    if processor.largest_id >= vlm.vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has a token {processor.largest_id}, and the vocabulary of config.json ends with "
            f"{vlm.vocabulary - 1}: is the tokenizer another model's?"
        )
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
