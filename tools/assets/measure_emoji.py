"""Measure what could leak between the splits of the emoji data: pictures, and the names of concepts.

python tools/assets/measure_emoji.py            # prints the figures of the data card
"""

import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from build_emoji import Build
from emoji_concepts import measure_rms
from PIL import Image

LIMITS = (6.0, 16.0, 24.0)
"""RMS grey levels: one picture; near; alike."""


@dataclass(frozen=True)
class Measure:
    """The two built files."""

    shipped: Path = Build.shipped
    public: Path = Build.public


def stack(rows: list[dict]) -> np.ndarray:
    """Rows with an encoded image -> uint8 [N, P]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).reshape(-1) for row in rows])


def describe_nearest(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Distance of every left picture to its nearest right one: quantiles, and how many lie under each limit."""
    nearest = measure_rms(left, right).min(axis=1)
    quantiles = {f"p{q}": round(float(np.percentile(nearest, q)), 1) for q in (0, 1, 50)}
    return {"pictures": len(left)} | quantiles | {f"<{limit:g}": int((nearest < limit).sum()) for limit in LIMITS}


def collect_names(path: Path) -> dict[str, set[tuple[str, str]]]:
    """Split -> (language, name) of its concepts, from the name questions of the shipped set."""
    asked = pc.field("task") == "name"
    table = pq.read_table(path, columns=["split", "language", "chosen"], filters=asked)
    names = defaultdict(set)
    for row in table.to_pylist():
        names[row["split"]].add((row["language"], row["chosen"]))
    return names


def main(measure: Measure) -> None:
    once = (pc.field("language") == "en") & (pc.field("task") == "group")
    shipped = pq.read_table(measure.shipped, columns=["image", "split"], filters=once).to_pylist()
    public = [row for row in pq.read_table(measure.public).to_pylist() if row["split"] == "train"]
    clients = {split: stack([row for row in shipped if row["split"] == split]) for split in ("train", "test")}
    names = collect_names(measure.shipped)
    spoken = {
        (language, text)
        for row in public
        for language, entry in json.loads(row["names"]).items()
        for text in (entry["label"], *entry["tags"])
    }
    report = {
        "client test pictures to public train pictures": describe_nearest(clients["test"], stack(public)),
        "client test pictures to client train pictures": describe_nearest(clients["test"], clients["train"]),
        "names of test concepts": len(names["test"]),
        "of these also a name in train": len(names["test"] & names["train"]),
        "of these also a label or tag in the public train corpus": len(names["test"] & spoken),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Measure))
