"""Small parquet files of exactly RLAIF-V's schema, and of the shipped emoji set's, with drawn images.

Nothing here pretends to be RLAIF-V: pictures are coloured shapes and the texts say so. Rows may be spoilt on purpose:
broken, truncated, missing and duplicate images, empty texts, any Unicode, missing columns.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
RLAIF_V = pa.schema(
    [
        ("ds_name", pa.string()),
        ("image", IMAGE),
        *((name, pa.string()) for name in ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx")),
        ("image_path", pa.string()),
    ]
)
"""The columns of the card of openbmb/RLAIF-V-Dataset, in its order."""

SOURCES = ("coco", "sharegpt4v", "movienet", "google_landmark_v2", "vqav2", "okvqa", "textvqa")
SHAPES = ("ellipse", "rectangle", "rounded_rectangle")
UNICODE = ("naïve café", "Улица", "質問は何ですか。", "这是什么？", "🚒 fire", "مرحبا", "a\u200bb", "ﬁne")


def draw_image(number: int, size: tuple[int, int] = (32, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """One shape on a ground; different numbers give different pictures."""
    rng = np.random.default_rng([7, number])
    colours = [tuple(int(value) for value in rng.integers(0, 256, 3)) for _ in range(2)]
    image = Image.new("RGB", size, colours[0])
    box = (2, 2, size[0] - 3 - number % 5, size[1] - 3 - number % 3)
    getattr(ImageDraw.Draw(image), SHAPES[number % 3])(box, fill=colours[1])
    image.putpixel((0, 0), (number % 256, number // 256 % 256, 1))
    out = io.BytesIO()
    image.convert(mode).save(out, kind)
    return out.getvalue()


def make_row(number: int, picture: int | None = None, **changes: Any) -> dict[str, Any]:
    """A row in RLAIF-V's form; `changes` replaces columns or adds some."""
    picture = number if picture is None else picture
    source = SOURCES[number % len(SOURCES)]
    return {
        "ds_name": "drawn",
        "image": {"bytes": draw_image(picture), "path": f"{picture}.png"},
        "question": f"What shape is this? ({number % 11})",
        "chosen": f"It is {SHAPES[picture % 3]} {number}",
        "rejected": f"It is {SHAPES[(picture + 1) % 3]} {number}",
        "origin_dataset": source,
        "origin_split": json.dumps(
            {"model": "none", "type": ("detailed description", "question answering")[number % 2]}
        ),
        "idx": str(number),
        "image_path": f"{source}/{picture}.png",
    } | changes


def make_rows(count: int, pictures: int | None = None) -> list[dict[str, Any]]:
    """`count` rows over `pictures` images (as many as rows, unless said)."""
    return [make_row(number, number % (pictures or count)) for number in range(count)]


def write_rows(
    path: Path, rows: Sequence[dict[str, Any]], drop: Iterable[str] = (), image: pa.DataType = IMAGE
) -> Path:
    """Write rows with RLAIF-V's types; unknown columns are text, and `drop` leaves columns out."""
    names = [name for name in (*RLAIF_V.names, *(n for n in rows[0] if n not in RLAIF_V.names)) if name not in drop]
    types = {name: RLAIF_V.field(name).type if name in RLAIF_V.names else pa.string() for name in names}
    types["image"] = image
    schema = pa.schema([(name, types[name]) for name in names])
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [pa.array([row.get(name) for row in rows], types[name]) for name in names]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path)
    return path


def make_emoji_rows(
    vendors: Sequence[str] = ("noto", "twemoji"),
    languages: Sequence[str] = ("en", "de"),
    tasks: Sequence[str] = ("group", "subgroup"),
    concepts: int = 120,
    groups: int = 6,
) -> list[dict[str, Any]]:
    """The shipped set's form: all concepts for all clients, but the second vendor lacks every tenth concept."""
    rows = []
    for place, vendor in enumerate(vendors):
        for concept in range(concepts):
            if place == 1 and concept % 10 == 1:
                continue
            picture = draw_image(concept + 10_000 * place, (16, 16))
            path = f"{vendor}/{concept:04X}.png"
            group = f"group{min(concept % (groups + 3), groups - 1)}"  # the last group is larger than the others
            for language in languages:
                for task in tasks:
                    rows.append(
                        {
                            "ds_name": "drawn-emoji",
                            "image": {"bytes": picture, "path": path},
                            "question": f"What {task}?",
                            "chosen": f"{group} {task} {language}",
                            "rejected": f"other {task} {language}",
                            "origin_dataset": vendor,
                            "origin_split": "{}",
                            "idx": f"{vendor}-{language}/{concept:04X}/{task}",
                            "image_path": path,
                            "client": f"{vendor}-{language}",
                            "split": ("train", "train", "train", "validation", "test")[concept % 5],
                            "language": language,
                            "concept": f"{concept:04X}",
                            "task": task,
                            "group": group,
                            "question_client": f"{language}: {task}?",
                        }
                    )
    return rows
