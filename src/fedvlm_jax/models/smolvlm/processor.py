"""The processor of SmolVLM and Idefics3: a picture is one tile, brought to the tower's size whole."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.chat_processor import ChatProcessor, make_frame, open_chat_processor, read_template
from fedvlm_jax.models.folder_files import read_json
from fedvlm_jax.models.processor_files import IMAGES, check_files, list_files
from fedvlm_jax.models.smolvlm.config import count_image_tokens, read_config

AROUND, WHOLE, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The family's way to chat, for folders that hold no template."""


def read_size(folder: Path) -> tuple[int, int] | None:
    """Height and width in pixels of a tile; None where no file states it.

    Raises:
        UserError: the file's JSON cannot be read, or states no number.
    """
    for name in list_files(folder, IMAGES):
        values = read_json(folder / name)
        try:
            side = values.get("image_processor", values).get("max_image_size", {}).get("longest_edge")
            if side:
                return int(side), int(side)
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{folder / name} states no max_image_size in pixels that can be read") from None
    return None


def open_processor(folder: Path) -> ChatProcessor:
    """Open a folder's processor, and try it out.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense.
    """
    check_files(folder)
    size, config = read_size(folder), read_config(read_json(folder / "config.json"), folder / "config.json")
    if size is None:
        raise UserError(f"{folder} does not say how large pictures are: max_image_size of its image processor")

    def build(images: Any, tokenizer: Any) -> ChatProcessor:
        def render(pictures: list[Image.Image]) -> np.ndarray:
            rows = [[picture] for picture in pictures]
            made = images(rows, do_image_splitting=False, do_pad=False, return_tensors="np")
            return np.asarray(made["pixel_values"])[:, 0]

        frame = make_frame(read_template(folder, tokenizer) or TEMPLATE, tokenizer, folder)
        text = f"{AROUND}{WHOLE}{IMAGE * count_image_tokens(config)}{AROUND}"
        return ChatProcessor(tokenizer, images, frame, IMAGE, text, size, render)

    needs = "an image processor with max_image_size and a tokenizer, as SmolVLM's has"
    return open_chat_processor(folder, needs, (AROUND, WHOLE, IMAGE), build)
