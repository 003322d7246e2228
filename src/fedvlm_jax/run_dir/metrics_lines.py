"""The lines of `metrics.jsonl`, one per round, written so that a kill leaves those that a checkpoint counts on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import naming
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.utils.files import write_text

NAME = "metrics.jsonl"


def drop_later(folder: Path, done: int) -> int:
    """Drop the lines of rounds after round `done`: they are run again. Return how many of the others are missing."""
    if not (done or (folder / NAME).exists()):
        return 0
    kept = [line for line in read_metrics(folder) if line["round"] <= done]
    write_text(folder / NAME, "".join(json.dumps(line) + "\n" for line in kept))
    return done - len(kept)


def append(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a round's line, on the disk when this returns."""
    path = folder / NAME
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
