"""The processor of Gemma 3 and MedGemma: the folder's chat template, and a picture's tokens in a frame of two."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.models.chat_processor import ChatProcessor, make_frame, open_chat_processor, read_template
from fedvlm_jax.models.gemma3.config import read_config
from fedvlm_jax.models.processor_files import open_settings, read_size

BEGIN, IMAGE, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'][0]['text'] + '\n\n' }}{% endif %}{% for part in message['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
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
            return np.asarray(images(pictures, do_pan_and_scan=False, return_tensors="np")["pixel_values"])

        template = read_template(folder, tokenizer) or TEMPLATE
        frame, text = make_frame(template, tokenizer, folder), IMAGE * config.mm_tokens_per_image
        text = f"\n\n{BEGIN}{text}{END}\n\n"
        return ChatProcessor(tokenizer, images, frame, IMAGE, lambda _: text, size, render, BEGIN, template)

    needs = "an image processor with a size and a tokenizer, as Gemma 3's has"
    return open_chat_processor(folder, needs, (BEGIN, IMAGE, END), build)
