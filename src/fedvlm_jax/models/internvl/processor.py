"""The processor of InternVL: a picture is one tile, brought to the tower's size whole."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.models.chat_processor import ChatProcessor, make_frame, open_chat_processor, read_template
from fedvlm_jax.models.internvl.config import count_image_tokens, read_config
from fedvlm_jax.models.processor_files import open_settings, read_size

BEGIN, IMAGE, END = "<img>", "<IMG_CONTEXT>", "</img>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<IMG_CONTEXT>\n' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The family's way to chat, for folders that hold no template."""


def open_processor(folder: Path) -> ChatProcessor:
    """Open a folder's processor, and try it out.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense.
    """
    size, config = open_settings(folder, read_config, read_size, "size")

    def build(images: Any, tokenizer: Any) -> ChatProcessor:
        def render(pictures: list[Image.Image]) -> np.ndarray:
            return np.asarray(images(pictures, crop_to_patches=False, return_tensors="np")["pixel_values"])

        template = read_template(folder, tokenizer) or TEMPLATE
        frame, text = make_frame(template, tokenizer, folder), f"{BEGIN}{IMAGE * count_image_tokens(config)}{END}"
        return ChatProcessor(tokenizer, images, frame, IMAGE, lambda _: text, size, render, IMAGE, template)

    needs = "an image processor with a size, as GOT-OCR2's, and a tokenizer, as InternVL's has"
    return open_chat_processor(folder, needs, (BEGIN, IMAGE, END), build)
