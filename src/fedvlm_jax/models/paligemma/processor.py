"""The processor of PaliGemma: image tokens, `<bos>`, the question and a line's end; its answers end with `<eos>`."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.chat_processor import ChatProcessor, Frame
from fedvlm_jax.models.paligemma.config import count_image_tokens, read_config
from fedvlm_jax.models.processor_files import open_files, open_settings, read_size, try_out

IMAGE = "<image>"


def open_processor(folder: Path) -> ChatProcessor:
    """Open a folder's processor, and try it out.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense.
    """
    size, config = open_settings(folder, read_config, read_size, "size")

    def join(images: Any, tokenizer: Any) -> ChatProcessor:
        if IMAGE not in tokenizer.get_vocab() or None in (tokenizer.bos_token, tokenizer.eos_token):
            raise UserError(f"the tokenizer in {folder} lacks {IMAGE}, or tokens that begin and end texts")

        def render(pictures: list[Image.Image]) -> np.ndarray:
            return np.asarray(images(pictures, return_tensors="np")["pixel_values"])

        frame = Frame(f"{IMAGE}{tokenizer.bos_token}", "\n", "", tokenizer.eos_token)
        text = IMAGE * count_image_tokens(config)
        return ChatProcessor(tokenizer, images, frame, IMAGE, lambda _: text, size, render, IMAGE, most_pictures=1)

    processor = open_files(folder, join, "an image processor with a size and a tokenizer, as PaliGemma's has")
    try_out(processor, processor.images, folder)
    return processor
