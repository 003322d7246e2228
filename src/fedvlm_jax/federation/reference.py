"""The answers' log-probabilities under the bare base, which preference objectives compare an adapter with.

The base is frozen, so these two numbers per row never change: they are computed once, before training, and travel with
the row. On disk they are kept by content, in a file that later runs, and a resumed one, find again.

With several processes each scores its share of the rows, and they exchange what they found.

Values agree to float32 rounding whatever batch a row was computed in, and are equal to the bit where they come from
the same file.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, PyTree

from fedvlm_jax import processes
from fedvlm_jax.data.encode import IGNORED, Examples
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs import Inputs
from fedvlm_jax.objectives.likelihood import score_pairs
from fedvlm_jax.sharding import CLIENTS

__all__ = ["ReferenceStore", "add_reference", "compute_reference", "make_score"]

RECORD = np.dtype([("key", "u1", 16), ("values", "<f4", 2)])
"""A pair in the file: the hash of its content, and the log-probabilities of its two answers."""

QUIET = 10.0
"""Seconds between two notes about work that goes on."""

Reference = Float[np.ndarray, "rows 2"]
"""Log-probabilities of every row's chosen and rejected answer, summed over the tokens, in nats."""


class ReferenceStore:
    """Log-probabilities of pairs, by content; in memory, or also in a file to which whole records are appended."""

    def __init__(self, file: Path | None = None) -> None:
        """Open a store; `file` is where it is kept, in memory only by default.

        Raises:
            UserError: the file's folder cannot be made.
        """
        self._file = file
        self._known: dict[bytes, np.ndarray] = {}
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--system.cache-dir {file.parent}: {error.strerror}") from None
        if file.exists():
            content = file.read_bytes()
            whole = len(content) // RECORD.itemsize  # a kill may have cut the last record short
            if whole * RECORD.itemsize != len(content):
                with file.open("r+b") as opened:
                    opened.truncate(whole * RECORD.itemsize)
            self._remember(np.frombuffer(content, RECORD, whole))

    def __len__(self) -> int:
        return len(self._known)

    @property
    def where(self) -> str:
        """Where it is kept, for a message."""
        return "kept in memory" if self._file is None else f"kept in {self._file}"

    def find(self, key: bytes) -> Float[np.ndarray, " 2"] | None:
        """The chosen and the rejected answer's log-probability, where they are known."""
        return self._known.get(key)

    def add(self, keys: list[bytes], values: Float[np.ndarray, "rows 2"]) -> None:
        """Keep these pairs' values."""
        records = np.empty(len(keys), RECORD)
        records["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        records["values"] = values
        if self._file is not None:
            with self._file.open("ab") as opened:
                opened.write(records.tobytes())
        self._remember(records)

    def _remember(self, records: np.ndarray) -> None:
        self._known |= {record["key"].tobytes(): record["values"] for record in records}


def make_score(vlm: Any) -> Callable[[PyTree, dict[str, Any]], dict[str, Any]]:
    """Compile-once `(params, batch) -> scores` of the bare base."""
    return jax.jit(lambda params, batch: score_pairs(vlm, params, None, batch))


def compute_reference(
    score: Callable[[PyTree, dict[str, Any]], dict[str, Any]],
    params: PyTree,
    examples: Examples,
    inputs: Inputs,
    store: ReferenceStore,
    *,
    batch: int,
    mesh: Mesh,
    note: Callable[[str], None],
) -> Reference:
    """Score every row's two answers with the bare base, as far as the store does not know them.

    Args:
        score: what `make_score` made.
        params: the base.
        examples: all rows of the federation.
        inputs: rows -> batches.
        store: what is known already; what is computed is added to it.
        batch: rows at a time on each device.
        mesh: of this process; the rows of a batch are spread over its axis `clients`.
        note: told about long work.
    """
    keys = _hash_pairs(examples)
    own = [keys[row] for row in processes.share_out(len(keys))]
    places = {key: row for row, key in enumerate(keys)}
    missing = [places[key] for key in dict.fromkeys(own) if store.find(key) is None]
    across = NamedSharding(mesh, PartitionSpec(CLIENTS))
    size = batch * mesh.shape[CLIENTS]
    if missing:
        note(f"reference log-probabilities: {len(missing)} of {len(own)} pairs to compute, {store.where}")
    done, told, running = 0, time.monotonic(), None
    for start in range(0, len(missing) + size, size):
        rows, finished = missing[start : start + size], running
        if rows:  # while the devices work on these, the ones before are stored, and the next are read
            padded = np.asarray(rows + rows[:1] * (size - len(rows)))
            running = rows, score(params, jax.device_put(inputs(padded), across))
        if finished is not None:
            rows, scores = finished
            values = np.stack([scores["chosen_log_prob"], scores["rejected_log_prob"]], axis=1)[: len(rows)]
            store.add([keys[row] for row in rows], values)
            done += len(rows)
            if done < len(missing) and time.monotonic() - told > QUIET:
                note(f"reference log-probabilities: {done} of {len(missing)}")
                told = time.monotonic()
    return processes.gather(np.asarray([store.find(key) for key in own], np.float32).reshape(-1, 2), len(keys))


def add_reference(inputs: Inputs, reference: Reference) -> Inputs:
    """The same batches with `reference_chosen` and `reference_rejected` beside the labels."""

    def read(rows: Int[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        chosen, rejected = np.moveaxis(reference[rows], -1, 0)
        return inputs(rows) | {"reference_chosen": chosen, "reference_rejected": rejected}

    return read


def _hash_pairs(examples: Examples) -> list[bytes]:
    """Hash all that a pair's log-probabilities depend on beside the base and its processor: image and tokens."""
    rejected = examples.rejected
    if rejected is None:
        raise ValueError("these examples have no rejected answers")
    keys = []
    for row in range(len(examples)):
        digest = hashlib.blake2b(examples.images.keys[examples.image[row]].encode(), digest_size=16)
        prompt = examples.input_ids[row][examples.attention_mask[row] != 0]
        answers = (labels[row][labels[row] != IGNORED] for labels in (examples.labels, rejected))
        for part in (prompt, *answers):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part, np.int32).tobytes())
        keys.append(digest.digest())
    return keys
