"""Frozen image features: computed when an image is first asked for, kept within a bound, in memory or on disk.

Everything before the first adapted weight is constant per image, so its output is computed once per content. Florence-2
makes 577 tokens of 768 numbers from a picture: 1.7 MiB in float32, 74 GB for all of RLAIF-V even in bfloat16. Hence a
bound that is announced before the work starts, and nothing that reads the whole: what a store holds on disk is read row
by row, never mapped, so resident memory does not grow with it. What does not fit is computed each time it is asked for;
nothing is thrown out, because on data that is read epoch by epoch a cache that replaces its oldest entries hits never.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax.data.images import Images
from fedvlm_jax.errors import UserError

__all__ = ["FeatureStore", "PixelReader", "choose_chunk", "fingerprint_params", "is_vision_frozen"]

VISION = ("vision_tower", "image_projector")
PIXELS = 32 * 64 * 64 * 20
"""Pixels that go through the vision tower at a time, about: 32 pictures at most, 4 of 768x768."""
SHORT = 8
"""A chunk that is not full goes in pieces of an eighth of one: two programs, little padding."""
GIB = 2**30


class PixelReader(Protocol):
    """What a store asks of a model's processor."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pixels."""
        ...

    @property
    def fingerprint(self) -> str:
        """Size, mean, std and the like: what makes the same picture the same pixels."""
        ...

    def pixels(self, images: Sequence[Any], /) -> np.ndarray:
        """PIL images -> normalised pixels [B, H, W, 3] float32."""
        ...


def is_vision_frozen(adapter: dict[str, Any]) -> bool:
    """Does the adapter leave the vision tower and the projector alone, so that their output can be kept?"""
    return not any(part in adapter for part in VISION)


def fingerprint_params(params: dict[str, Any], parts: Sequence[str] = VISION) -> str:
    """A hash of these parts of the weights: what is cached of their output is valid for them alone."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path({part: params[part] for part in parts}):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def choose_chunk(height: int, width: int) -> int:
    """How many pictures of this size go through the vision tower at a time: a power of two, 32 at most."""
    fitting = max(1, PIXELS // (height * width))
    return min(32, 1 << (fitting.bit_length() - 1))


class FeatureStore:
    """Frozen image features [P, D] by image content, computed at most once each while they fit.

    On disk a store is a folder with `features.bin`, to which rows are appended, and `keys.txt`, with a line per row
    that is written after the row: whatever a kill leaves behind, the first len(keys) rows are whole. Safe to use from
    several threads.
    """

    def __init__(
        self,
        compute: Callable[[Any], Any],
        read: PixelReader,
        *,
        limit: int,
        row: jax.ShapeDtypeStruct | None = None,
        folder: Path | None = None,
        workers: int = 4,
    ) -> None:
        """Open a store.

        Args:
            compute: pixels [B, H, W, 3] -> features [B, P, D]; jitted.
            read: turns images into pixels.
            limit: bytes that are kept at most.
            row: shape and dtype of one image's features [P, D]; by default `compute` is traced for them.
            folder: where to keep features; in memory by default.
            workers: threads that decode images.

        Raises:
            UserError: the folder cannot be made, or holds features of another shape.
        """
        self._compute, self._read, self._folder, self._workers = compute, read, folder, workers
        self.chunk = choose_chunk(*read.size)
        if row is None:
            made = jax.eval_shape(compute, jax.ShapeDtypeStruct((self.chunk, *read.size, 3), jnp.float32))
            row = jax.ShapeDtypeStruct(made.shape[1:], made.dtype)
        self.shape, self.dtype = tuple(row.shape), np.dtype(row.dtype)
        self.capacity = int(limit) // self.row_bytes
        self._place: dict[str, int] = {}
        self._kept = np.empty((0, *self.shape), self.dtype)
        self._lock = threading.Lock()
        self._file = -1
        if folder is not None:
            self._open(folder)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def on_disk(self) -> bool:
        """Are features kept in files, which later runs find again?"""
        return self._folder is not None

    def announce(self, images: Images) -> str:
        """Say what keeping these images' features takes, before any is computed."""
        new = sum(key not in self._place for key in images.keys)
        room = max(0, self.capacity - len(self))
        where = "in memory" if self._folder is None else f"in {self._folder}"
        text = f"image features: {len(images)} images, {_size(len(images) * self.row_bytes)} {where}"
        text += f", {len(images) - new} of them there already" if new < len(images) and len(self) else ""
        if new > room:
            text += f"; {room} of {new} new ones fit the bound of {_size(self.capacity * self.row_bytes)}, the others "
            text += "are computed each time (--system.cache-gib, --system.cache)"
        return text

    def reserve(self, images: Images) -> None:
        """Make room in memory for these images at once; what is not used costs no memory."""
        with self._lock:
            new = sum(key not in self._place for key in images.keys)
            self._grow(len(self) + new)

    def gather(self, images: Images, index: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... tokens width"]:
        """Features of the images at these positions, computing those that are not kept.

        Args:
            images: unique images.
            index: [...] positions among them; may repeat.

        Returns:
            Features [..., P, D].

        Raises:
            BrokenImageError: an image that cannot be decoded.
        """
        distinct, which = np.unique(index, return_inverse=True)
        out = np.empty((len(distinct), *self.shape), self.dtype)
        with self._lock:
            places = np.asarray([self._place.get(images.keys[image], -1) for image in distinct], np.int64)
            self._load(places, out)
            missing = np.flatnonzero(places < 0)
            for start in range(0, len(missing), self.chunk):
                part = missing[start : start + self.chunk]
                out[part] = self._make(images, distinct[part])
                self._append([images.keys[image] for image in distinct[part]], out[part])
        return out[which.reshape(np.shape(index))]

    def _make(self, images: Images, chosen: np.ndarray) -> np.ndarray:
        # One by one, so that no more decoded pictures are in memory than there are threads.
        with ThreadPoolExecutor(self._workers) as pool:
            read = pool.map(lambda image: self._read.pixels([images.decode(image)]), chosen.tolist())
            pixels = np.concatenate(list(read))
        width = self.chunk if len(chosen) == self.chunk else max(1, self.chunk // SHORT)
        parts = [pixels[start : start + width] for start in range(0, len(pixels), width)]
        parts[-1] = np.concatenate([parts[-1], np.repeat(pixels[:1], width - len(parts[-1]), axis=0)])
        return np.concatenate([np.asarray(self._compute(part)) for part in parts])[: len(chosen)]

    def _load(self, places: np.ndarray, out: np.ndarray) -> None:
        there = np.flatnonzero(places >= 0)
        if self._folder is None:
            out[there] = self._kept[places[there]]
            return
        for row in there:
            stored = os.pread(self._file, self.row_bytes, int(places[row]) * self.row_bytes)
            out[row] = np.frombuffer(stored, self.dtype).reshape(self.shape)

    def _append(self, keys: list[str], features: np.ndarray) -> None:
        room = max(0, self.capacity - len(self))
        keys, features = keys[:room], features[:room]
        if not keys:
            return
        first = len(self)
        if self._folder is None:
            self._grow(first + len(keys))
            self._kept[first : first + len(keys)] = features
        else:
            with (self._folder / "features.bin").open("ab") as file:
                file.write(np.ascontiguousarray(features).tobytes())
            with (self._folder / "keys.txt").open("a") as file:
                file.write("".join(f"{key}\n" for key in keys))
        self._place |= {key: first + number for number, key in enumerate(keys)}

    def _grow(self, wanted: int) -> None:
        """Room for `wanted` rows, at least doubled, so that filling a store copies each row once or twice."""
        size = len(self._kept)
        if self._folder is not None or min(wanted, self.capacity) <= size:
            return
        larger = np.empty((min(self.capacity, max(wanted, 2 * size)), *self.shape), self.dtype)
        larger[: len(self)] = self._kept[: len(self)]
        self._kept = larger

    def _open(self, folder: Path) -> None:
        header = {"shape": list(self.shape), "dtype": str(self.dtype)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "shape.json").exists():
                stored = json.loads((folder / "shape.json").read_text())
                if stored != header:
                    raise UserError(f"{folder} holds features of {stored}, not {header}: remove it")
            else:
                (folder / "shape.json").write_text(json.dumps(header))
            keys = (folder / "keys.txt").read_text().split("\n") if (folder / "keys.txt").exists() else [""]
            whole = keys[:-1]  # what follows the last line break was cut short
            (folder / "keys.txt").write_text("".join(f"{key}\n" for key in whole))
            with (folder / "features.bin").open("ab") as file:
                file.truncate(len(whole) * self.row_bytes)
            self._file = os.open(folder / "features.bin", os.O_RDONLY)
        except OSError as error:
            raise UserError(f"--system.cache-dir {folder}: {error.strerror}") from None
        self._place = {key: place for place, key in enumerate(whole)}


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
