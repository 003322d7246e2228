"""The processor of Qwen2.5-VL and Qwen3-VL: a picture is brought whole to one square size, the rest of it filled up.

transformers gives every picture a grid of its own, and so does this processor where a run says how many pixels one has
at most: sizes and patches are then transformers' own. Else all have one grid, so that programs have one shape: a
picture keeps its proportions, lies in the upper left, where its patches have the rows and columns that transformers
gives them, and what is left of the square has the mean colour, which is 0 in pixels.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm_jax.data.prompts import Grid
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import PictureGrids
from fedvlm_jax.models.chat_processor import ChatProcessor, make_frame, open_chat_processor, read_template
from fedvlm_jax.models.folder_files import read_json, require_integer
from fedvlm_jax.models.processor_files import IMAGES, MOST_PIXELS, MOST_TOKENS, check_files, list_files
from fedvlm_jax.models.qwen_vl.config import read_config, read_tower
from fedvlm_jax.models.qwen_vl.grid import FRAMES
from fedvlm_jax.models.qwen_vl.tower import GridShape

USUAL_SIDE = 448
"""Side of pictures in pixels unless a run says otherwise: 196 image tokens of Qwen3-VL, 256 of Qwen2.5-VL."""

BEGIN, IMAGE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_SYSTEM = {
    "qwen2_5_vl": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}",
    "qwen3_vl": "",
}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    f"{{{{ part['text'] if part['type'] == 'text' else '{BEGIN}{IMAGE}{END}' }}}}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The family's way to chat, for folders that hold no template."""


def read_size(folder: Path, image_size: int | None = None) -> tuple[int, int]:
    """Height and width in pixels that pictures are brought to.

    Args:
        folder: the model's.
        image_size: the side that a run asks for; by default the multiple of an image token's next to `USUAL_SIDE`, with
            as many pixels as the image processor allows.

    Raises:
        UserError: the configuration cannot be read, or the side is no multiple of an image token's.
    """
    side, _ = _choose_side(folder, image_size)
    return side, side


def _choose_side(folder: Path, image_size: int | None) -> tuple[int, GridShape]:
    file = folder / "config.json"
    vision = read_tower(read_config(read_json(file), file).vision_config)
    step = vision.patch * vision.merge
    if image_size is None:
        least, most = _read_bounds(folder)
        side = max(1, round(USUAL_SIDE / step))
        side = min(max(side, math.ceil(least**0.5 / step)), max(1, math.floor(most**0.5 / step)))
        return side * step, vision
    if image_size % step or not 0 < image_size <= MOST_PIXELS:
        near = min(max(1, round(image_size / step)), MOST_PIXELS // step) * step
        raise UserError(
            f"pictures of {image_size} pixels a side make no whole image tokens of {folder}, which have {step} a side "
            f"each: take {near}, for example, at most {MOST_PIXELS}"
        )
    return image_size, vision


def _read_bounds(folder: Path) -> tuple[int, int]:
    """Read the fewest and the most pixels of a picture, which files call by two names."""
    for name in list_files(folder, IMAGES):
        values = read_json(folder / name)
        values = values.get("image_processor", values)
        size = (values.get("size") if isinstance(values, dict) else None) or {}
        if not isinstance(values, dict) or not isinstance(size, dict):
            raise UserError(f"{folder / name} states no size in pixels that can be read")
        bounds = (
            values.get("min_pixels") or size.get("shortest_edge") or 1,
            values.get("max_pixels") or size.get("longest_edge") or MOST_PIXELS**2,
        )
        for bound in bounds:
            require_integer(f"{folder / name}: the fewest and the most pixels of a picture", bound, 1, 2**40)
        return bounds
    return 1, MOST_PIXELS**2


def open_processor(folder: Path, image_size: int | None = None, image_pixels: int | None = None) -> ChatProcessor:
    """Open a folder's processor, and try it out.

    Args:
        folder, image_size: as for `read_size`.
        image_pixels: of a picture at most, each then having a grid of its own; by default all have one size.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense, or the side or so few pixels cannot be.
    """
    check_files(folder)
    if image_pixels is not None:
        if image_size is not None:
            raise UserError("--image-size and --image-pixels exclude each other: leave one out")
        image_size = _choose_largest(folder, image_pixels)
    side, vision = _choose_side(folder, image_size)
    kind = str(read_json(folder / "config.json")["model_type"])
    tokens = (side // vision.patch // vision.merge) ** 2

    def build(images: Any, tokenizer: Any) -> ChatProcessor:
        asked = {"patch_size": vision.patch, "merge_size": vision.merge, "temporal_patch_size": FRAMES}
        for name, value in asked.items():
            if (found := getattr(images, name, None)) != value:
                raise UserError(f"the image processor in {folder} has {name}={found!r}, and the tower {value}")
        template = read_template(folder, tokenizer) or _SYSTEM[kind] + _TEMPLATE
        frame, text = make_frame(template, tokenizer, folder), IMAGE * tokens
        if frame.head.count(IMAGE) != 1:
            raise UserError(f"the chat template in {folder} does not write {IMAGE} once for a picture")
        render = partial(_render, images, vision, side)
        size = (side, side)
        cut = grids = None
        if image_pixels is not None:
            cut = _choose_grids(images, vision, image_pixels, folder)
            grids = _cut_on_grids(images, vision, image_pixels, cut)
        return ChatProcessor(
            tokenizer, images, frame, IMAGE, lambda _: text, size, render, IMAGE, template, cut=cut, grids=grids
        )

    needs = "an image processor with patch_size and a tokenizer, as Qwen's have"
    return open_chat_processor(folder, needs, (BEGIN, IMAGE, END), build)


def _choose_largest(folder: Path, pixels: int) -> int:
    """Choose the side of the largest square of so many pixels.

    Raises:
        UserError: no image token fits, or more than there may be.
    """
    _, vision = _choose_side(folder, None)
    step = vision.patch * vision.merge
    most = min(MOST_TOKENS * step**2, MOST_PIXELS**2)
    if not step**2 <= pixels <= most:
        raise UserError(
            f"--image-pixels {pixels}: an image token of {folder} has {step**2:,} pixels, so expected from that to "
            f"{most:,}"
        )
    return math.isqrt(pixels) // step * step


def _choose_grids(images: Any, vision: GridShape, pixels: int, folder: Path) -> Callable[[int, int], Grid]:
    """Make what chooses the grid of a picture by its height and width, as transformers does.

    Raises:
        UserError: the folder's processor gives every picture more pixels.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    step, least = vision.patch * vision.merge, _read_least(images)
    if (smallest := (math.ceil(least**0.5 / step) * step) ** 2) > pixels:
        raise UserError(
            f"--image-pixels {pixels}: the image processor in {folder} gives pictures {least:,} at least: say "
            f"{smallest:,} or more"
        )

    def choose(height: int, width: int) -> Grid:
        try:
            high, wide = smart_resize(height, width, step, least, pixels)
        except ValueError:
            raise UserError("a picture's side is more than 200 times the other") from None
        if high * wide > pixels:
            raise UserError(f"a picture is so long that its grid has more than --image-pixels {pixels}")
        return Grid(high // step, wide // step)

    return choose


def _read_least(images: Any) -> int:
    least = dict(images.size).get("shortest_edge") or 1
    require_integer("the fewest pixels of a picture", least, 1, 2**40)
    return least


def _cut_on_grids(images: Any, vision: GridShape, pixels: int, choose: Callable[[int, int], Grid]) -> PictureGrids:
    """Make what cuts pictures into patches on the grids that `choose` gives them, and try it out."""
    size = {"shortest_edge": _read_least(images), "longest_edge": pixels}

    def cut(picture: Image.Image) -> np.ndarray:
        made = images([picture.convert("RGB")], do_resize=True, size=size, return_tensors="np")
        patches = np.asarray(made["pixel_values"], np.float32)
        shape = (choose(picture.height, picture.width).tokens * vision.merge**2, 3 * FRAMES * vision.patch**2)
        if patches.shape != shape:
            raise UserError(f"the image processor made patches {patches.shape} of a picture, expected {shape}")
        return patches

    cut(Image.new("RGB", (8, 12)))  # for its errors
    return PictureGrids(pixels=pixels, most=pixels // (vision.patch * vision.merge) ** 2, patches=cut)


def _render(images: Any, vision: GridShape, side: int, pictures: list[Image.Image]) -> np.ndarray:
    """Make pixels [B, 3, side, side] of pictures, from the patches that transformers makes of the filled squares."""
    mean = images.image_mean if images.do_normalize else (0.5, 0.5, 0.5)
    red, green, blue = (round(255 * float(part)) for part in mean)
    resample = Image.Resampling(int(images.resample))

    def fill(picture: Image.Image) -> Image.Image:
        square, longest = Image.new("RGB", (side, side), (red, green, blue)), max(picture.size)
        width, height = (max(1, round(part * side / longest)) for part in picture.size)
        square.paste(picture.resize((width, height), resample))
        return square

    filled = [fill(picture) for picture in pictures]
    made = images(filled, do_resize=False, return_tensors="np")["pixel_values"]
    blocks, merge, patch = side // vision.patch // vision.merge, vision.merge, vision.patch
    grid = np.asarray(made).reshape(len(filled), blocks, blocks, merge, merge, -1, FRAMES, patch, patch)
    return grid[..., 0, :, :].transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(len(filled), -1, side, side)
