"""Checks that a folder's tokenizer and its configuration are of the same model."""

from pathlib import Path

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Processor, Vlm
from fedvlm_jax.models.beam_search import Settings


def check_tokens(vlm: Vlm, settings: Settings, processor: Processor, folder: Path) -> None:
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
    forced = settings.forced_bos_token_id
    if forced is not None and forced != (first := int(processor.answers(["a"], 4)[0, 0])):
        raise UserError(
            f"{folder}: generated answers begin with forced_bos_token_id={settings.forced_bos_token_id}, and the "
            f"tokenizer begins those that are learnt with {first}: is the post_processor of tokenizer.json whole?"
        )
    for name, number in (("pad", settings.pad_token_id), ("forced BOS", settings.forced_bos_token_id)):
        if number is not None and number not in processor.framing:
            raise UserError(
                f"{folder}: the {name} token of generation is {number}, which in the tokenizer is a token of texts"
            )
