"""The processor of LLaVA and LLaVA-OneVision: a picture is brought to the tower's size, as the folder's files say."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.models.chat_processor import ChatProcessor, make_frame, open_chat_processor, read_template
from fedvlm_jax.models.llava.config import count_image_tokens, has_newline, read_config
from fedvlm_jax.models.processor_files import open_settings, read_crop_size, shorten

IMAGE = "<image>"
_PARTS = "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>\n' }}{% endfor %}"
TEMPLATES = {
    "llava": (
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
        + _PARTS
        + "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llava_onevision": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}" + _PARTS + "{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""The families' ways to chat, for folders that hold no template: Vicuna's and Qwen2's."""


def open_processor(folder: Path) -> ChatProcessor:
    """Open a folder's processor, and try it out.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense.
    """
    size, config = open_settings(folder, read_config, read_crop_size, "crop_size or size")

    def build(images: Any, tokenizer: Any) -> ChatProcessor:
        def render(pictures: list[Image.Image]) -> np.ndarray:
            pictures = [shorten(picture, max(size), crop=not has_newline(config)) for picture in pictures]
            if has_newline(config):
                # Of several pictures each is padded to a square and makes one tile; of one alone it would be more.
                made = images([[*pictures, pictures[0]]], return_tensors="np")
                return np.asarray(made["pixel_values"])[:-1, 0]
            return np.asarray(images(pictures, return_tensors="np")["pixel_values"])

        template = read_template(folder, tokenizer) or TEMPLATES[config.model_type]
        frame, text = make_frame(template, tokenizer, folder), IMAGE * count_image_tokens(config)
        return ChatProcessor(tokenizer, images, frame, IMAGE, lambda _: text, size, render, IMAGE, template)

    needs = "an image processor with a size and a tokenizer, as LLaVA's has"
    return open_chat_processor(folder, needs, (IMAGE,), build)
