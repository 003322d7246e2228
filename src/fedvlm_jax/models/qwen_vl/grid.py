"""Patches of a picture on their grid: their order, their positions, and the windows that they lie in.

Patches are in the order of the blocks of `merge` x `merge` that become one image token, row by row, and row by row
inside of a block. All but `cut_patches` and `place_tokens` are constants of the grid's size.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

FRAMES = 2
"""Frames of a film that a patch spans; a picture is that many like ones."""


def order_patches(rows: int, columns: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch, [N] each.

    >>> [axis.tolist() for axis in order_patches(2, 4, 2)]
    [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3, 2, 3]]
    """
    axes = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    blocks = (axis.reshape(rows // merge, merge, columns // merge, merge) for axis in axes)
    row, column = (block.transpose(0, 2, 1, 3).reshape(-1) for block in blocks)
    return row, column


def cut_patches(pixels: Float[Array, "B H W C"], patch: int, merge: int) -> Float[Array, "B N F"]:
    """Cut pictures into patches, each as its numbers by channel, frame, row and column.

    >>> cut_patches(jnp.ones((1, 8, 12, 3)), 2, 2).shape
    (1, 24, 24)
    """
    count, height, width, channels = pixels.shape
    step = patch * merge
    x = pixels.reshape(count, height // step, merge, patch, width // step, merge, patch, channels)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)[..., None, :, :]
    x = jnp.broadcast_to(x, (*x.shape[:-3], FRAMES, patch, patch))
    return x.reshape(count, (height // patch) * (width // patch), -1)


def blend_positions(rows: int, columns: int, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Weigh learned positions of a square grid for a grid of another size, bilinearly, corners on corners.

    Args:
        side: of the learned grid.

    Returns:
        Of every patch its four learned positions, [N, 4], and their weights, [N, 4] float32.

    >>> blend_positions(2, 2, 2, 3)[0][:, 0].tolist()
    [0, 2, 6, 8]
    """

    def weigh(place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        below = np.floor(source).astype(np.int64)
        taps = np.stack([below, below + 1], -1)
        weights = np.maximum(1 - np.abs(source[:, None] - taps), 0).astype(np.float32)
        return np.clip(taps, 0, side - 1), weights

    row, column = order_patches(rows, columns, merge)
    (above, tall), (left, wide) = weigh(row, rows), weigh(column, columns)
    taps = above[:, :, None] * side + left[:, None]
    return taps.reshape(-1, 4), (tall[:, :, None] * wide[:, None]).reshape(-1, 4)


def number_windows(rows: int, columns: int, merge: int, window: int) -> np.ndarray:
    """Number of the window, of `window` patches a side, that every patch lies in, [N] int32.

    >>> number_windows(2, 4, 2, 2).tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    row, column = order_patches(rows, columns, merge)
    return (row // window * -(-columns // window) + column // window).astype(np.int32)


def rotate_axes(rows: int, columns: int, merge: int, width: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the patches' rotary angles, [N, width] float32: rows turn half of a head, columns half."""
    frequencies = 1 / theta ** (np.arange(0, width // 2, 2, dtype=np.float32) / np.float32(width // 2))
    row, column = (axis[:, None] * frequencies.astype(np.float32) for axis in order_patches(rows, columns, merge))
    angles = np.concatenate([row, column, row, column], -1).astype(np.float32)
    return np.cos(angles), np.sin(angles)


def choose_axes(sections: tuple[int, int, int], *, interleaved: bool) -> tuple[int, ...]:
    """Say for every frequency which axis of a picture it turns with: 0 time, 1 rows, 2 columns.

    Args:
        sections: frequencies for each axis.
        interleaved: one after another as long as there are any, and not in three blocks.

    >>> choose_axes((2, 1, 1), interleaved=True), choose_axes((2, 1, 1), interleaved=False)
    ((0, 1, 2, 0), (0, 0, 1, 2))
    """
    if not interleaved:
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for place in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[place] = axis
    return tuple(axes)


def place_tokens(
    is_image: Bool[Array, "B T"], pictures: int | Int[Array, "B N 2"], axes: tuple[int, ...]
) -> Int[Array, "B T F"]:
    """Position of every token for every frequency (M-RoPE, arXiv 2409.12191, section 2.1).

    Texts count on in all axes. A picture has one time, its rows and its columns from there on, and takes as many
    positions as it has rows, or columns if these are more.

    Args:
        pictures: image tokens of each, where all are squares of one size; or rows and columns of each, 0 after the
            last.

    >>> place_tokens(jnp.array([[False, True, True, True, True, False]]), 4, (0, 1, 2))[0].T.tolist()
    [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    >>> place_tokens(jnp.array([[True, True, True, False]]), jnp.array([[[1, 3], [0, 0]]]), (0, 1, 2))[0].T.tolist()
    [[0, 0, 0, 3], [0, 0, 0, 3], [0, 1, 2, 3]]
    """
    seen = jnp.cumsum(is_image, 1)
    number = jnp.maximum(seen - 1, 0)  # of an image token among its row's
    if isinstance(pictures, int):
        columns = math.isqrt(pictures)
        begun = jnp.where(is_image, number // pictures, seen // pictures)  # whole pictures before a token
        taken, inside = begun * columns, number % pictures
    else:
        counts = pictures.prod(-1)
        over = jnp.cumsum(counts, 1)[:, None] <= jnp.where(is_image, number, seen)[..., None]  # [B, T, N]: is before
        taken, inside = (over * pictures.max(-1)[:, None]).sum(-1), number - (over * counts[:, None]).sum(-1)
        which = jnp.minimum(over.sum(-1), pictures.shape[1] - 1)
        columns = jnp.maximum(jnp.take_along_axis(pictures[..., 1], which, 1), 1)
    start = jnp.arange(is_image.shape[1]) - jnp.where(is_image, number, seen) + taken
    inside = jnp.where(is_image, inside, 0)
    by_axis = jnp.stack([start, start + inside // columns, start + inside % columns], -1)
    return by_axis[..., jnp.asarray(axes)]
