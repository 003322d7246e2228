"""What the tests of the small bases that ship ask them: texts of every language, and pictures that none has seen."""

import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

import fedvlm_jax

ASSETS = Path(fedvlm_jax.__file__).parent / "assets"
EMOJI = ASSETS / "emoji" / "emoji.parquet"
NAMES = {
    "en": "animals & nature",
    "de": "Süßigkeiten",
    "fr": "visage avec bouche en cœur",
    "es": "¡piñata!",
    "it": "tempo atmosferico",
    "pt": "coração",
    "nl": "sloten & sleutels",
    "pl": "kłódki & klucze",
    "sv": "ansikten på katter",
    "ru": "смайлики и эмоции",
    "ja": "食べ物と飲み物",
    "zh": "微笑",
}


def read_unseen(processor):
    """Sixty validation pictures of vendors that no model saw, as a batch, and their groups."""
    columns = ["image", "idx", "chosen", "question_neutral"]
    filters = [("split", "=", "validation"), ("task", "=", "group"), ("language", "=", "en")]
    rows = sorted(pq.read_table(EMOJI, columns=columns, filters=filters).to_pylist(), key=lambda row: row["idx"])
    rows = rows[:: len(rows) // 60][:60]
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    ids, mask = processor.prompts([row["question_neutral"] for row in rows])
    batch = {"pixel_values": processor.pixels(images), "input_ids": ids, "attention_mask": mask}
    return batch, [row["chosen"] for row in rows]
