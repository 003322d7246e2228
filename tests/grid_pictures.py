"""Pictures of different shapes, and their features on grids of their own, as the tests of Qwen-VL take them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from fedvlm_jax.data.picture_views import Views, list_views
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.unique_images import unique_images

PIXELS = 1600
"""Of a picture at most: 25 image tokens of the tiny models."""

SHAPES = ((60, 20), (24, 70), (33, 33), (200, 90), (9, 40))
"""Widths and heights; some are made smaller, one is made larger."""


def draw(shapes=SHAPES, seed: int = 0) -> list[Image.Image]:
    """Draw noise."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in shapes]


def list_pictures(pictures: list[Image.Image], processor) -> Views:
    """List pictures as the data of a run have them."""

    def write(picture: Image.Image) -> dict[str, object]:
        out = io.BytesIO()
        picture.save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    table = Table("drawn", pa.table({"image": [write(picture) for picture in pictures]}), Path())
    images = unique_images(table, np.arange(len(pictures)))[0]
    return list_views(images, [processor.cut(*size) for size in images.read_sizes()])
