"""Frozen features of views: through the vision tower in batches whose shapes never depend on what is asked for.

A compiled program gives a picture the same bits at every place of a batch and beside any others (the tests check it),
but programs for other shapes round otherwise. So pictures of one size go through batches of one width; pictures on
grids of their own are filled up to the next of few sizes, which has a width of its own and is compiled once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from fedvlm_jax.data.batches import bucket
from fedvlm_jax.models import GridVision, Params, PictureGrids, Processor, Vlm

if TYPE_CHECKING:
    from fedvlm_jax.data.picture_views import Views  # which loads pyarrow

PIXELS = 32 * 64 * 64 * 20  # decoded at a time, about: 32 pictures at most, 4 of 768x768
WIDTH = 4  # pictures that go through the vision tower at a time: the last batch is filled up
WIDE = 1024  # image tokens that go through it at a time where there are more to a picture, or a picture alone


@dataclass(frozen=True, eq=False)
class FixedFeatures:
    """Features of views that are all brought to one size.

    Attributes:
        compute: pixels [B, H, W, 3], as `read` makes them, -> features [B, P, D]; jitted.
        shape: of a view's features, (P, D).
        workers: threads that decode images.
    """

    compute: Callable[[Any], Any]
    read: Processor
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    workers: int = 4

    @property
    def width(self) -> int:
        """Numbers of an image token."""
        return self.shape[1]

    @property
    def each(self) -> int:
        """Image tokens of every view."""
        return self.shape[0]

    def count(self, views: "Views", /) -> Int[np.ndarray, " views"]:
        """Count the image tokens of all views."""
        return np.full(len(views), self.each)

    def split(self, views: "Views", chosen: Int[np.ndarray, " some"], /) -> list[Int[np.ndarray, " part"]]:
        """Split chosen views into parts that are decoded at a time."""
        del views
        return _cut(chosen, choose_chunk(self.read.size[0] * self.read.size[1]))

    def make(self, views: "Views", part: Int[np.ndarray, " part"], /) -> list[Float[np.ndarray, "tokens width"]]:
        """Make the features of views.

        Raises:
            UserError: an image cannot be decoded.
        """
        pixels = views.render(part, self.read.pixels, self.workers)
        batches = (_fill(pixels[start : start + WIDTH], WIDTH) for start in range(0, len(pixels), WIDTH))
        return [row for batch in batches for row in np.asarray(self.compute(batch))][: len(part)]


@dataclass(frozen=True, eq=False)
class GridFeatures:
    """Features of pictures on grids of their own, each filled up to the next of the sizes of `bucket`.

    Attributes:
        compute: patches [B, N, F] and their places [B, N, …] -> features [B, P, D]; jitted.
        vision, pictures: of the model and of its processor.
        width, dtype: of an image token.
        workers: threads that decode images.
    """

    compute: Callable[[Any, PyTree], Any]
    vision: GridVision
    pictures: PictureGrids
    width: int
    dtype: np.dtype[Any]
    workers: int = 4

    @property
    def each(self) -> None:
        """Return None: image tokens differ from view to view."""
        return None

    def count(self, views: "Views", /) -> Int[np.ndarray, " views"]:
        """Count the image tokens of all views."""
        return np.zeros(0, np.int64) if views.grids is None else views.grids.prod(-1, dtype=np.int64)

    def split(self, views: "Views", chosen: Int[np.ndarray, " some"], /) -> list[Int[np.ndarray, " part"]]:
        """Split chosen views into parts that are decoded at a time, of one size each."""
        sizes, parts = self._choose_sizes(views, chosen), list[np.ndarray]()
        for size in np.unique(sizes).tolist():
            parts += _cut(chosen[sizes == size], max(_choose_width(size), choose_chunk(size * self.vision.pixels)))
        return parts

    def make(self, views: "Views", part: Int[np.ndarray, " part"], /) -> list[Float[np.ndarray, "tokens width"]]:
        """Make the features of views of one size.

        Raises:
            UserError: an image cannot be decoded.
        """
        grids, size = views.find_grids(part).tolist(), int(self._choose_sizes(views, part).max())
        length, width, made = size * self.vision.patches, _choose_width(size), list[np.ndarray]()
        cut = views.cut(part, self.pictures.patches, self.workers)
        for start in range(0, len(cut), width):
            chosen = slice(start, start + width)
            patches = _fill(np.stack([_lengthen(each, length) for each in cut[chosen]]), width)
            places = [self.vision.places(rows, columns, length) for rows, columns in grids[chosen]]
            places += places[:1] * (width - len(places))
            made += list(np.asarray(self.compute(patches, jax.tree.map(lambda *leaves: np.stack(leaves), *places))))
        return [row[: rows * columns] for row, (rows, columns) in zip(made, grids, strict=False)]

    def _choose_sizes(self, views: "Views", chosen: np.ndarray) -> np.ndarray:
        """Choose the image tokens that each of the views is filled up to."""
        counts = self.count(views)[chosen].tolist()
        return np.asarray([min(bucket(count), self.pictures.most) for count in counts], np.int64)


Features = FixedFeatures | GridFeatures


def open_features(vlm: Vlm, params: Params, processor: Processor) -> Features:
    """Open what makes a model's features; nothing is compiled yet.

    >>> import jax
    >>> from fedvlm_jax.models import load_vlm, open_processor
    >>> open_features(*load_vlm("smolvlm-nano"), open_processor("smolvlm-nano")).each
    16
    """
    dtype = np.dtype(vlm.dtype)
    # The weights are an argument: as a constant each program would have its copy.
    if processor.grids is None:
        compute = partial(jax.jit(lambda params, pixels: vlm.image_features(params, None, pixels)), params)
        return FixedFeatures(compute, processor, (vlm.image_tokens(*processor.size), vlm.image_width), dtype)
    assert vlm.grids is not None
    return GridFeatures(
        partial(jax.jit(vlm.grids.features), params), vlm.grids, processor.grids, vlm.image_width, dtype
    )


def choose_chunk(pixels: int) -> int:
    """Choose how many pictures of so many pixels are decoded at a time: a power of two, 32 at most.

    >>> choose_chunk(64 * 64), choose_chunk(768 * 768)
    (32, 4)
    """
    fitting = max(1, PIXELS // pixels)
    return min(32, 1 << (fitting.bit_length() - 1))


def _choose_width(tokens: int) -> int:
    """Choose how many pictures of so many image tokens go through the tower at a time.

    >>> _choose_width(64), _choose_width(512), _choose_width(4096)
    (4, 2, 1)
    """
    return max(1, min(WIDTH, WIDE // tokens))


def _cut(chosen: np.ndarray, length: int) -> list[np.ndarray]:
    return [chosen[start : start + length] for start in range(0, len(chosen), length)]


def _fill(pictures: np.ndarray, width: int) -> np.ndarray:
    """Fill a batch up with its first picture."""
    return np.concatenate([pictures, np.repeat(pictures[:1], width - len(pictures), axis=0)])


def _lengthen(patches: np.ndarray, length: int) -> np.ndarray:
    return np.pad(patches, ((0, length - len(patches)), (0, 0)))
