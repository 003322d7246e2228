"""Frozen image features: computed when an image is first asked for, kept within a bound, in memory or on disk.

Everything before the first adapted weight is constant per image, so its output is computed once per content. Florence-2
makes 577 tokens of 768 numbers from a picture: 1.7 MiB in float32, 74 GB for all of RLAIF-V even in bfloat16. Hence a
bound that is announced before the work starts, and nothing that reads the whole: what a store holds on disk is read row
by row, never mapped, so resident memory does not grow with it. What does not fit is computed each time it is asked for;
nothing is thrown out, because on data that is read epoch by epoch a cache that replaces its oldest entries hits never.

Features must be the same bits whatever was computed before, or a resumed run would end elsewhere. A compiled program
gives a picture the same bits at every place of a batch and beside any others (the tests check it on the shipped model),
but programs for batches of other sizes round otherwise: so every picture goes through batches of one size.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.models import Params, Processor, Vlm
from fedvlm_jax.utils.files import read_plain, write_bytes
from fedvlm_jax.utils.record_store import Records
from fedvlm_jax.utils.tree import flatten, partition

if TYPE_CHECKING:
    from fedvlm_jax.data.picture_views import Views  # which loads pyarrow

PIXELS = 32 * 64 * 64 * 20  # decoded at a time, about: 32 pictures at most, 4 of 768x768
WIDTH = 4  # pictures that go through the vision tower at a time, always: the last batch is filled up
GIB = 2**30


def is_vision_frozen(vlm: Vlm, adapter: lora.Adapter) -> bool:
    """Tell whether the adapter leaves the vision tower and the connector alone, so that their output can be kept."""
    return not any(map(_makes_features(vlm), flatten(adapter)))


def fingerprint_vision(vlm: Vlm, params: Params) -> str:
    """Hash the weights that image features are made with, which are valid for them alone."""
    return fingerprint_params(partition(params, _makes_features(vlm))[0])


def fingerprint_params(params: Params) -> str:
    """Hash weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in flatten(params).items():
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _makes_features(vlm: Vlm) -> Callable[[str], bool]:
    return lambda path: vlm.component(path) in ("vision", "connector")


def choose_chunk(height: int, width: int) -> int:
    """Choose how many pictures of this size are decoded at a time: a power of two, 32 at most.

    >>> choose_chunk(64, 64), choose_chunk(768, 768)
    (32, 4)
    """
    fitting = max(1, PIXELS // (height * width))
    return min(32, 1 << (fitting.bit_length() - 1))


class FeatureStore:
    """Frozen features [P, D] of whole pictures and tiles, by content, computed at most once each while they fit.

    On disk a store is a folder of `Records`, which several processes may share: each finds what the others added, and
    rows that do not fit their digest are computed again. Safe to use from several threads.
    """

    def __init__(
        self,
        compute: Callable[[Any], Any],
        read: Processor,
        *,
        limit: int,
        row: jax.ShapeDtypeStruct | None = None,
        folder: Path | None = None,
        workers: int = 4,
    ) -> None:
        """Open a store of at most `limit` bytes.

        Args:
            compute: pixels [B, H, W, 3], as `read` makes them, -> features [B, P, D]; jitted.
            row: shape and dtype of one view's features [P, D]; by default `compute` is traced for them.
            folder: where to keep features; in memory by default.
            workers: threads that decode images.

        Raises:
            UserError: the folder cannot be made, or holds features of another shape.
        """
        self._compute, self._read, self._folder, self._workers = compute, read, folder, workers
        self.chunk = choose_chunk(*read.size)
        if row is None:
            made = jax.eval_shape(compute, jax.ShapeDtypeStruct((WIDTH, *read.size, 3), jnp.float32))
            row = jax.ShapeDtypeStruct(made.shape[1:], made.dtype)
        self.shape, self.dtype = tuple(row.shape), np.dtype(row.dtype)
        self.capacity = int(limit) // self.row_bytes
        self._lock = threading.Lock()
        self._known: dict[str, np.ndarray] = {}  # what is kept in memory
        self._records = None if folder is None else self._open(folder)

    def __len__(self) -> int:
        return len(self._known if self._records is None else self._records)

    @property
    def row_bytes(self) -> int:
        """Bytes of one view's features."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def on_disk(self) -> bool:
        """Whether features are kept in files, which later runs find again."""
        return self._folder is not None

    def announce(self, views: "Views") -> str:
        """Say what keeping these views' features takes, before any is computed."""
        new = sum(not self._has(key) for key in views.keys)
        room = self._count_room()
        where = "in memory" if self._folder is None else f"in {self._folder}"
        what = format_count(len(views.images), "image") + (
            f" in {format_count(len(views), 'part')}" if len(views) > len(views.images) else ""
        )
        text = f"image features: {what}, {_size(len(views) * self.row_bytes)} {where}"
        text += f", {len(views) - new} of them there already" if new < len(views) and len(self) else ""
        if new > room:
            text += f"; {room} of {new} new ones fit the bound of {_size(self.capacity * self.row_bytes)}, the others "
            text += "are computed each time (--system.cache-gib, --system.cache)"
        return text

    def gather(self, views: "Views", index: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... tokens width"]:
        """Return features [..., P, D] of views at these positions, zeros at -1, computing those that are not kept.

        Raises:
            UserError: an image that cannot be decoded.
        """
        distinct, which = np.unique(index, return_inverse=True)
        blank = int((distinct[:1] < 0).sum())
        out = np.zeros((len(distinct), *self.shape), self.dtype)
        with self._lock:
            keys = ["" if view < 0 else views.keys[view] for view in distinct]
            missing = self._load(keys, np.arange(blank, len(keys)), out)
            for start in range(0, len(missing), self.chunk):
                part = missing[start : start + self.chunk]
                if self._records is not None:  # another process may have been quicker
                    self._records.refresh()
                    part = self._load(keys, part, out)
                out[part] = self._make(views, distinct[part])
                self._keep([keys[row] for row in part], out[part])
        return out[which.reshape(np.shape(index))]

    def _make(self, views: "Views", chosen: np.ndarray) -> np.ndarray:
        if not len(chosen):
            return np.empty((0, *self.shape), self.dtype)
        pixels = views.render(chosen, self._read.pixels, self._workers)
        parts = [pixels[start : start + WIDTH] for start in range(0, len(pixels), WIDTH)]
        parts[-1] = np.concatenate([parts[-1], np.repeat(pixels[:1], WIDTH - len(parts[-1]), axis=0)])
        return np.concatenate([np.asarray(self._compute(part)) for part in parts])[: len(chosen)]

    def _has(self, key: str) -> bool:
        return key in self._known if self._records is None else bytes.fromhex(key) in self._records

    def _count_room(self) -> int:
        used = len(self) if self._records is None else self._records.count_bytes() // self.row_bytes
        return max(0, self.capacity - used)

    def _load(self, keys: list[str], rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Fill these rows of `out` with what is kept; returns those that are not."""
        missing = []
        for row in rows:
            if self._records is None:
                stored = self._known.get(keys[row])
            else:
                read = self._records.read(bytes.fromhex(keys[row]))
                stored = None if read is None else np.frombuffer(read, self.dtype).reshape(self.shape)
            if stored is None:
                missing.append(row)
            else:
                out[row] = stored
        return np.asarray(missing, np.int64)

    def _keep(self, keys: list[str], features: np.ndarray) -> None:
        room = self._count_room()
        if self._records is not None:
            found = [bytes.fromhex(key) for key in keys[:room]]
            self._records.add(found, (row.tobytes() for row in features[:room]))
        else:  # copies, for a view would keep the whole batch in memory
            self._known |= {key: row.copy() for key, row in zip(keys[:room], features[:room], strict=True)}

    def _open(self, folder: Path) -> Records:
        header = json.dumps({"shape": list(self.shape), "dtype": str(self.dtype)})
        try:
            records = Records(folder, self.row_bytes)
            file = folder / "shape.json"
            if not file.exists():
                write_bytes(file, header.encode())
            stored = read_plain(file).decode("utf-8", "replace")
        except OSError as error:
            raise UserError(f"--system.cache-dir {folder}: {error.strerror}") from None
        if stored != header:
            raise UserError(f"{folder} holds features of {stored}, not {header}: remove it")
        return records


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
