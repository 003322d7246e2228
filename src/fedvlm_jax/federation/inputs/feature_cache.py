"""Frozen image features: computed when an image is first asked for, kept within a bound, in memory or on disk.

Everything before the first adapted weight is constant per image, so its output is computed once per content. Florence-2
makes 577 tokens of 768 numbers from a picture: 1.7 MiB in float32, 74 GB for all of RLAIF-V even in bfloat16. Hence a
bound that is announced before the work starts, and nothing that reads the whole: what a store holds on disk is read row
by row, never mapped, so resident memory does not grow with it. What does not fit is computed each time it is asked for;
nothing is thrown out, because on data that is read epoch by epoch a cache that replaces its oldest entries hits never.

A row of a store is an image token, and a view has as many as its features take: all the same number where pictures are
brought to one size, others where they have grids of their own. Features must be the same bits whatever was computed
before, or a resumed run would end elsewhere: `view_features` sees to that.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.inputs.view_features import Features
from fedvlm_jax.models import Params, Vlm
from fedvlm_jax.utils.files import read_plain, write_bytes
from fedvlm_jax.utils.record_store import Records
from fedvlm_jax.utils.tree import flatten, partition

if TYPE_CHECKING:
    from fedvlm_jax.data.picture_views import Views  # which loads pyarrow

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


class FeatureStore:
    """Frozen features of whole pictures and tiles, by content, computed at most once each while they fit.

    On disk a store is a folder of `Records`, which several processes may share: each finds what the others added, and
    features that do not fit their digest are computed again. Safe to use from several threads.

    Attributes:
        each: image tokens of every view; None where they differ.
        width, dtype: of an image token.
        capacity: bytes that are kept at most.
    """

    def __init__(self, features: Features, *, limit: int, folder: Path | None = None) -> None:
        """Open a store of at most `limit` bytes.

        Args:
            features: what makes them.
            folder: where to keep them; in memory by default.

        Raises:
            UserError: the folder cannot be made, or holds features of another shape.
        """
        self._features, self._folder = features, folder
        self.each, self.width, self.dtype, self.capacity = features.each, features.width, features.dtype, int(limit)
        self._lock = threading.Lock()
        self._known: dict[str, np.ndarray] = {}  # what is kept in memory
        self._held = 0  # bytes of it
        self._records = None if folder is None else self._open(folder)

    def __len__(self) -> int:
        return len(self._known if self._records is None else self._records)

    @property
    def on_disk(self) -> bool:
        """Whether features are kept in files, which later runs find again."""
        return self._folder is not None

    def count_bytes(self, views: "Views") -> Int[np.ndarray, " views"]:
        """Count the bytes that the features of each view take."""
        return self._features.count(views) * (self.width * self.dtype.itemsize)

    def announce(self, views: "Views") -> str:
        """Say what keeping these views' features takes, before any is computed."""
        sizes = self.count_bytes(views)
        new = [int(size) for key, size in zip(views.keys, sizes, strict=True) if not self._has(key)]
        fitting = len(_choose_fitting(new, self.capacity - self._count_used()))
        where = "in memory" if self._folder is None else f"in {self._folder}"
        what = format_count(len(views.images), "image") + (
            f" in {format_count(len(views), 'part')}" if len(views) > len(views.images) else ""
        )
        text = f"image features: {what}, {_size(int(sizes.sum()))} {where}"
        text += f", {len(views) - len(new)} of them there already" if len(new) < len(views) and len(self) else ""
        if fitting < len(new):
            text += f"; {fitting} of {len(new)} new ones fit the bound of {_size(self.capacity)}, the others "
            text += "are computed each time (--system.cache-gib, --system.cache)"
        return text

    def gather(
        self, views: "Views", index: Int[np.ndarray, "*rows W"], tokens: int
    ) -> Float[np.ndarray, "*rows tokens width"]:
        """Return the features of rows of views at these positions, one after another, computing those not kept.

        Args:
            index: positions; -1 after a row's last view.
            tokens: image tokens that rows have room for; zeros follow the last.

        Raises:
            UserError: an image that cannot be decoded.
        """
        distinct = np.unique(index[index >= 0])
        with self._lock:
            found = self._load(views, distinct)
            missing = np.asarray([view for view in distinct.tolist() if view not in found], np.int64)
            for part in self._features.split(views, missing):
                if self._records is not None:  # another process may have been quicker
                    self._records.refresh()
                    found |= self._load(views, part)
                    part = np.asarray([view for view in part.tolist() if view not in found], np.int64)
                if not len(part):
                    continue
                made = dict(zip(part.tolist(), self._features.make(views, part), strict=True))
                self._keep([views.keys[view] for view in made], list(made.values()))
                found |= made
        rows = index.reshape(-1, index.shape[-1]).tolist()
        out = np.zeros((len(rows), tokens, self.width), self.dtype)
        for line, row in zip(out, rows, strict=True):
            start = 0
            for features in (found[view] for view in row if view >= 0):
                line[start : start + len(features)] = features
                start += len(features)
        return out.reshape(*index.shape[:-1], tokens, self.width)

    def _has(self, key: str) -> bool:
        return key in self._known if self._records is None else bytes.fromhex(key) in self._records

    def _count_used(self) -> int:
        return self._held if self._records is None else self._records.count_bytes()

    def _load(self, views: "Views", chosen: np.ndarray) -> dict[int, np.ndarray]:
        """Load what is kept of views: position -> features."""
        loaded, counts = dict[int, np.ndarray](), self._features.count(views)
        for view in chosen.tolist():
            key, count = views.keys[view], int(counts[view])
            if self._records is None:
                stored = self._known.get(key)
            else:
                read = self._records.read(bytes.fromhex(key), count)
                stored = None if read is None else np.frombuffer(read, self.dtype).reshape(count, self.width)
            if stored is not None:
                loaded[view] = stored
        return loaded

    def _keep(self, keys: list[str], made: list[np.ndarray]) -> None:
        fitting = _choose_fitting([each.nbytes for each in made], self.capacity - self._count_used())
        if self._records is not None:
            self._records.add([bytes.fromhex(keys[at]) for at in fitting], (made[at].tobytes() for at in fitting))
        else:  # copies, for a view would keep the whole batch in memory
            self._known |= {keys[at]: made[at].copy() for at in fitting}
            self._held += sum(made[at].nbytes for at in fitting)

    def _open(self, folder: Path) -> Records:
        header = json.dumps({"width": self.width, "dtype": str(self.dtype)})
        try:
            records = Records(folder, self.width * self.dtype.itemsize)
            file = folder / "shape.json"
            if not file.exists():
                write_bytes(file, header.encode())
            stored = read_plain(file).decode("utf-8", "replace")
        except OSError as error:
            raise UserError(f"--system.cache-dir {folder}: {error.strerror}") from None
        if stored != header:
            raise UserError(f"{folder} holds features of {stored}, not {header}: remove it")
        return records


def _choose_fitting(sizes: Sequence[int], room: int) -> list[int]:
    """Choose places of what fits together, in order, leaving out what does not fit any more.

    >>> _choose_fitting([3, 4, 2], 6)
    [0, 2]
    """
    chosen = list[int]()
    for place, size in enumerate(sizes):
        if size <= room:
            chosen.append(place)
            room -= size
    return chosen


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
