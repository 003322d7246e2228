"""What the model reads of a row: tokens, and either the image's frozen features or its pixels.

Everything before the first adapted weight is constant per image. Unless the adapter reaches into the vision tower or
the projector, a row's image is its features, computed once per unique image and kept: in memory, or in files that
later runs find again. Otherwise pixels are decoded for the rows of each round.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fedvlm_jax.data.encode import Examples
from fedvlm_jax.data.images import Images
from fedvlm_jax.errors import UserError

__all__ = ["FeatureStore", "Inputs", "PixelReader", "fingerprint_params", "is_vision_frozen", "make_inputs"]

Inputs = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(rows [...]) -> the batch of these rows, arrays [..., …]."""

VISION = ("vision_tower", "image_projector")
CHUNK = 32
"""Images that go through the vision tower at a time."""


class PixelReader(Protocol):
    """What `make_inputs` asks of a model's processor."""

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


def fingerprint_params(params: dict[str, Any], parts: Iterable[str] = VISION) -> str:
    """A hash of some parts of the base: what is computed with them and kept is valid for these weights alone.

    Image features depend on the vision parts, which are the default.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path({part: params[part] for part in parts}):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


class FeatureStore:
    """Frozen image features [P, D] by image content, computed at most once each.

    On disk a store is a folder with `features.bin`, to which rows are appended, and `keys.txt`, with a line per row
    that is written after the row: whatever a kill leaves behind, the first len(keys) rows are whole.
    """

    def __init__(self, compute: Callable[[Any], Any], read: PixelReader, folder: Path | None = None) -> None:
        """Open a store.

        Args:
            compute: pixels [B, H, W, 3] -> features [B, P, D].
            read: turns images into pixels.
            folder: where to keep features; in memory only by default.
        """
        self._compute, self._read, self._folder = compute, read, folder
        self._place: dict[str, int] = {}
        self._rows: np.ndarray | None = None
        if folder is not None:
            self._open(folder)

    def __len__(self) -> int:
        return len(self._place)

    def add(self, images: Images, note: Callable[[str], None] = lambda text: None) -> np.ndarray:
        """Compute what is missing of these images; returns each image's row in `rows` [I]."""
        missing = [index for index, key in enumerate(images.keys) if key not in self._place]
        fresh = []
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            with ThreadPoolExecutor(2) as pool:
                pixels = self._read.pixels(list(pool.map(images.decode, chunk)))
            padded = np.concatenate([pixels, np.repeat(pixels[:1], CHUNK - len(chunk), axis=0)])
            features = np.asarray(self._compute(padded))[: len(chunk)]
            self._append([images.keys[index] for index in chunk], features)
            fresh.append(features)
            if start == 0:
                size = features[0].nbytes * len(missing)
                note(f"image features: {len(missing)} images, {size / 2**20:.1f} MiB, {self._where()}")
        if self._folder is not None and len(self._place):
            self._map(self._folder)
        elif fresh:
            old = [] if self._rows is None else [self._rows]
            self._rows = np.concatenate([*old, *fresh])
        return np.asarray([self._place[key] for key in images.keys], np.int64)

    @property
    def rows(self) -> Float[np.ndarray, "images tokens width"]:
        """All features of the store; memory-mapped where it is on disk."""
        if self._rows is None:
            raise RuntimeError("the store is empty: add images first")
        return self._rows

    def _where(self) -> str:
        return "kept in memory" if self._folder is None else f"kept in {self._folder}"

    def _append(self, keys: list[str], features: np.ndarray) -> None:
        for key in keys:
            self._place[key] = len(self._place)
        if self._folder is None:
            return
        header = self._folder / "shape.json"
        if not header.exists():
            header.write_text(json.dumps({"shape": features.shape[1:], "dtype": str(features.dtype)}))
        with (self._folder / "features.bin").open("ab") as file:
            file.write(features.tobytes())
        with (self._folder / "keys.txt").open("a") as file:
            file.write("".join(f"{key}\n" for key in keys))

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--system.cache-dir {folder}: {error.strerror}") from None
        if not (folder / "shape.json").exists():
            return
        keys = (folder / "keys.txt").read_text().split("\n") if (folder / "keys.txt").exists() else [""]
        whole = keys[:-1]  # what follows the last line break was cut short
        shape, dtype = self._shape(folder)
        (folder / "keys.txt").write_text("".join(f"{key}\n" for key in whole))
        with (folder / "features.bin").open("ab") as file:
            file.truncate(len(whole) * int(np.prod(shape)) * dtype.itemsize)
        self._place = {key: place for place, key in enumerate(whole)}
        if whole:
            self._map(folder)

    def _shape(self, folder: Path) -> tuple[tuple[int, ...], np.dtype]:
        stored = json.loads((folder / "shape.json").read_text())
        return tuple(stored["shape"]), jnp.dtype(stored["dtype"])

    def _map(self, folder: Path) -> None:
        shape, dtype = self._shape(folder)
        self._rows = np.memmap(folder / "features.bin", dtype, "r", shape=(len(self._place), *shape))


def make_inputs(
    examples: Examples, processor: PixelReader, store: FeatureStore | None, note: Callable[[str], None]
) -> Inputs:
    """Build the function from rows to batches.

    Args:
        examples: all rows of the federation.
        processor: of the model.
        store: where frozen features are; None where the adapter reaches into the vision tower, so that pixels are read.
        note: told about long work.
    """
    text = {
        "input_ids": examples.input_ids,
        "attention_mask": examples.attention_mask,
        "labels": examples.labels,
    }
    if examples.rejected is not None:
        text["rejected_labels"] = examples.rejected
    place = store.add(examples.images, note) if store is not None else None

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = {name: array[rows] for name, array in text.items()}
        image = examples.image[rows]
        if store is not None and place is not None:
            batch["image_features"] = np.asarray(store.rows[place[image]])
        else:
            distinct, which = np.unique(image, return_inverse=True)
            pixels = processor.pixels([examples.images.decode(int(index)) for index in distinct])
            batch["pixel_values"] = pixels[which.reshape(image.shape)]
        return batch

    return read
