"""Tables in memory with images of a few bytes: what partitions look at, without files or pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import Federation
from fedvlm_jax.data.table import Table


def make_table(pictures: Sequence[int | None], **columns: Sequence[str | None]) -> Table:
    """A row per picture number (None for a row without one), with the given text columns."""
    images = [None if picture is None else {"bytes": b"picture %d" % picture, "path": None} for picture in pictures]
    texts = {"idx": [str(place) for place in range(len(images))], "question": ["?"] * len(images)}
    texts |= {"chosen": ["!"] * len(images)} | {name: list(values) for name, values in columns.items()}
    arrays = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    return Table("made-up", pa.table(arrays | {n: pa.array(v, pa.string()) for n, v in texts.items()}), Path())


def as_lists(federation: Federation) -> list[list]:
    return [[client.name, *(client.rows_of(split).tolist() for split in SPLITS)] for client in federation.clients]


def count_labels(federation: Federation, labels: Sequence[str]) -> np.ndarray:
    """How many rows of each label (sorted) each client has: [C, L]."""
    names = sorted(set(labels))
    owned = [np.concatenate([client.rows_of(split) for split in SPLITS]) for client in federation.clients]
    return np.asarray([[sum(labels[row] == name for row in rows) for name in names] for rows in owned])
