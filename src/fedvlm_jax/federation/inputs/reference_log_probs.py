"""The answers' log-probabilities under the bare base, which preference objectives compare an adapter with.

The base is frozen, so these two numbers per row never change: they are computed once, before training, and travel with
the row. On disk they are kept by content, in a file that later runs, and a resumed one, find again.

With several processes each scores its share of the rows, and they exchange what they found.

Batches have one size, in which a row has the same bits at every place and beside any others; another size rounds
otherwise, so a folder is for one.
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

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives.log_probs import score_pairs
from fedvlm_jax.utils.record_store import Records

VALUES = np.dtype("<f4")  # the log-probabilities of a pair's two answers, one after the other, as they are kept
QUIET = 10.0  # seconds between two notes about work that goes on
Reference = Float[np.ndarray, "rows 2"]  # log π₀ of every row's chosen and rejected answer, over all tokens, in nats


class ReferenceStore:
    """Log-probabilities of pairs, by content; in memory, or also in a folder that processes may share."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open a store; `folder` is where it is kept, in memory only by default.

        Raises:
            UserError: the folder cannot be made.
        """
        self.where = "kept in memory" if folder is None else f"kept in {folder}"  # for a message
        self._known: dict[bytes, np.ndarray] = {}
        try:
            self._records = None if folder is None else Records(folder, 2 * VALUES.itemsize)
        except OSError as error:
            assert folder is not None
            raise UserError(f"--system.cache-dir {folder.parent}: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._known if self._records is None else self._records)

    def find(self, key: bytes) -> Float[np.ndarray, " 2"] | None:
        """Return the chosen and the rejected answer's log-probability, where they are known."""
        if key not in self._known and self._records is not None:
            stored = self._records.read(key)
            if stored is not None:
                self._known[key] = np.frombuffer(stored, VALUES)
        return self._known.get(key)

    def add(self, keys: list[bytes], values: Float[np.ndarray, "rows 2"]) -> None:
        """Keep these pairs' values."""
        values = np.ascontiguousarray(values, VALUES)
        if self._records is not None:
            self._records.add(keys, (row.tobytes() for row in values))
        self._known |= dict(zip(keys, values, strict=True))


def make_score(vlm: Vlm) -> Callable[[PyTree, dict[str, Any]], dict[str, Any]]:
    """Make `(params, batch) -> scores` of the bare base, which compiles once."""
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

    What is computed, `batch` rows at a time on each device of this process's mesh, is added to the store; `note` gets
    lines about long work.
    """
    keys = _hash_pairs(examples)
    own = [keys[row] for row in processes.share_out(len(keys))]
    places = {key: row for row, key in enumerate(keys)}
    missing = [places[key] for key in dict.fromkeys(own) if store.find(key) is None]
    across = NamedSharding(mesh, PartitionSpec(CLIENTS))
    size = batch * mesh.shape[CLIENTS]
    if missing:
        note(
            f"reference log-probabilities: {len(missing)} of {format_count(len(own), 'pair')} to compute, {store.where}"
        )
    done, noted, running = 0, time.monotonic(), None
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
            if done < len(missing) and time.monotonic() - noted > QUIET:
                note(f"reference log-probabilities: {done} of {len(missing)}")
                noted = time.monotonic()
    return processes.gather(np.asarray([store.find(key) for key in own], np.float32).reshape(-1, 2), len(keys))


def add_reference(inputs: Inputs, reference: Reference) -> Inputs:
    """Put `reference_chosen` and `reference_rejected` beside the labels of every batch."""

    def read(rows: Int[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        chosen, rejected = np.moveaxis(reference[rows], -1, 0)
        return inputs(rows) | {"reference_chosen": chosen, "reference_rejected": rejected}

    return read


def _hash_pairs(examples: Examples) -> list[bytes]:
    """Hash all that a pair's log-probabilities depend on beside the base and its processor: images and tokens."""
    rejected = examples.rejected
    if rejected is None:
        raise ValueError("these examples have no rejected answers")
    keys = []
    for row in range(len(examples)):
        pictures = [examples.images.keys[index] for index in examples.pictures[row].tolist() if index >= 0]
        digest = hashlib.blake2b("".join(pictures).encode(), digest_size=16)
        prompt = examples.input_ids[row][examples.attention_mask[row] != 0]
        answers = (labels[row][labels[row] != IGNORED] for labels in (examples.labels, rejected))
        for part in (prompt, *answers):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part, np.int32).tobytes())
        keys.append(digest.digest())
    return keys
