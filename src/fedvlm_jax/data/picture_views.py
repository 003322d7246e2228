"""What a vision tower sees at a time: whole pictures, and the tiles that some models cut them into."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fedvlm_jax.data.prompts import Grid, Tiles
from fedvlm_jax.data.unique_images import Images
from fedvlm_jax.utils.digests import digest_parts

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Views:
    """Views W of unique images, those of an image one after another."""

    images: Images
    image: Int[np.ndarray, " views"]  # into `images`
    number: Int[np.ndarray, " views"]  # among the views of its image
    keys: tuple[str, ...]  # content hashes as hex: that of the image where it is its only view
    grids: Int[np.ndarray, "views 2"] | None = None  # rows and columns of image tokens; None where all have one size

    def __len__(self) -> int:
        return len(self.keys)

    def render(
        self, chosen: Int[np.ndarray, " some"], pixels: Callable[[list[Image.Image]], np.ndarray], workers: int
    ) -> Float[np.ndarray, "some H W 3"]:
        """Decode the images behind views, each once, and make the views' pixels, as a processor's `pixels` does.

        Raises:
            UserError: an image cannot be decoded.
        """
        if not len(chosen):
            return pixels([])
        images, places = np.unique(self.image[chosen], return_inverse=True)
        made = self._decode_each(images, lambda picture: pixels([picture]), workers)
        numbers = self.number[chosen].tolist()
        return np.stack([made[place][number] for place, number in zip(places.tolist(), numbers, strict=True)])

    def cut(
        self, chosen: Int[np.ndarray, " some"], patches: Callable[[Image.Image], np.ndarray], workers: int
    ) -> list[Float[np.ndarray, "patches numbers"]]:
        """Decode the images of views, each of which is whole, and cut each into its patches.

        Raises:
            UserError: an image cannot be decoded.
        """
        return self._decode_each(self.image[chosen], patches, workers)

    def _decode_each(self, images: np.ndarray, make: Callable[[Image.Image], T], workers: int) -> list[T]:
        # One by one, so that no more decoded pictures are in memory than there are threads.
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda image: make(self.images.decode(image)), images.tolist()))

    def find_grids(self, index: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows 2"]:
        """Return the grids of views at these positions, 0 x 0 at -1; views must have grids of their own."""
        assert self.grids is not None
        return np.concatenate([self.grids, np.zeros((1, 2), np.int32)])[index]

    def count_tokens(self, index: Int[np.ndarray, "rows W"]) -> Int[np.ndarray, " rows"]:
        """Count the image tokens of rows of such views."""
        return self.find_grids(index).prod(-1).sum(-1)


def list_views(images: Images, tiles: Sequence[Tiles | Grid] | None = None) -> Views:
    """List all views of images, whose tiles or grids are given in their order; without them all are whole."""
    tiles = [Tiles()] * len(images) if tiles is None else tiles
    grids = [each for each in tiles if isinstance(each, Grid)]
    counts = [each.views for each in tiles]
    keys = [
        key if count == 1 else digest_parts([key.encode()], number, *each).hex()
        for key, count, each in zip(images.keys, counts, tiles, strict=True)
        for number in range(count)
    ]
    image = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    number = np.concatenate([np.empty(0, np.int32), *(np.arange(count, dtype=np.int32) for count in counts)])
    own = np.asarray(grids, np.int32) if grids else None
    return Views(images, image, number.astype(np.int32), tuple(keys), own)


def number_views(pictures: Int[np.ndarray, "rows P"], tiles: Sequence[Tiles | Grid]) -> Int[np.ndarray, "rows W"]:
    """Number the views of every row's pictures, one after another; -1 after the last.

    >>> number_views(np.asarray([[0, 1], [1, -1]]), [Tiles(1, 1), Tiles()]).tolist()
    [[0, 1, 2], [2, -1, -1]]
    """
    counts = np.asarray([each.views for each in tiles], np.int64)
    if (counts == 1).all():
        return pictures.astype(np.int32)
    first = np.cumsum(counts) - counts
    rows = [
        [int(first[picture]) + view for picture in row if picture >= 0 for view in range(counts[picture])]
        for row in pictures.tolist()
    ]
    numbers = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int32)
    for line, row in zip(numbers, rows, strict=True):
        line[: len(row)] = row
    return numbers
