"""The processor of SmolVLM and Idefics3: a picture is brought to the tower's size whole, or cut into tiles as well."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.data.prompts import Tiles
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.chat_processor import ChatProcessor, make_frame, open_chat_processor, read_template
from fedvlm_jax.models.folder_files import read_json
from fedvlm_jax.models.processor_files import IMAGES, MOST_PIXELS, list_files, open_settings
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


def open_processor(folder: Path, image_tiles: int | None = None) -> ChatProcessor:
    """Open a folder's processor, and try it out.

    Args:
        folder: the model's.
        image_tiles: along a picture's longer side; by default pictures stay whole.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense, or so many tiles are not made.
    """
    size, config = open_settings(folder, read_config, read_size, "max_image_size")
    tiles, side, count = image_tiles or 1, size[0], count_image_tokens(config)
    if tiles * side > MOST_PIXELS:
        raise UserError(f"--image-tiles {tiles}: {folder} cuts pictures into {MOST_PIXELS // side} a side at most")

    def build(images: Any, tokenizer: Any) -> ChatProcessor:
        if tiles > 1 and f"<row_{tiles}_col_{tiles}>" not in tokenizer.get_vocab():
            raise UserError(f"--image-tiles {tiles}: the tokenizer in {folder} has no token for so many")
        options = {"do_image_splitting": tiles > 1, "size": {"longest_edge": tiles * side}}

        def cut(height: int, width: int) -> Tiles:
            return Tiles(*images.get_number_of_image_patches(height, width, options)[1:])

        def render(pictures: list[Image.Image]) -> np.ndarray:
            if tiles == 1:
                rows = [[picture] for picture in pictures]
                made = images(rows, do_image_splitting=False, do_pad=False, return_tensors="np")
                return np.asarray(made["pixel_values"])[:, 0]
            made = [images([[picture]], do_pad=False, return_tensors="np", **options) for picture in pictures]
            return np.concatenate([np.asarray(one["pixel_values"])[0] for one in made])

        template = read_template(folder, tokenizer) or TEMPLATE
        return ChatProcessor(
            tokenizer, images, make_frame(template, tokenizer, folder), IMAGE, partial(write_picture, count), size,
            render, IMAGE, template, cut=cut if tiles > 1 else None, tiles=tiles,
        )  # fmt: skip

    needs = "an image processor with max_image_size and a tokenizer, as SmolVLM's has"
    return open_chat_processor(folder, needs, (AROUND, WHOLE, IMAGE), build)


def write_picture(count: int, tiles: Tiles) -> str:
    r"""Write what stands for a picture: its tiles by row and column, then the whole of it, `count` image tokens each.

    >>> write_picture(1, Tiles(1, 2)).replace(AROUND, "|")
    '|<row_1_col_1><image>|<row_1_col_2><image>\n\n|<global-img><image>|'
    """
    lines = (
        "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{IMAGE * count}" for column in range(tiles.columns)) + "\n"
        for row in range(tiles.rows)
    )
    return "".join(lines) + ("\n" if tiles.rows else "") + f"{AROUND}{WHOLE}{IMAGE * count}{AROUND}"
