# /// script
# requires-python = ">=3.11"
# dependencies = ["resvg-py==0.5.0", "numpy>=2,<3", "pillow>=11,<13", "pyarrow>=20", "tyro>=1,<2"]
# ///
"""Build the emoji data: the set that ships with its clients, and the public corpus for pre-training.

    python tools/assets/build_emoji.py                 # both, from the committed splits
    python tools/assets/build_emoji.py --fix-splits    # draw the splits anew first (only before any pre-training)

Needs npm on the path for the packages and resvg-py for the pictures; using the built files needs neither. The same
packages and library versions give the same bytes.
"""

import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import emoji_concepts
import emoji_sources
import emoji_texts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from emoji_sources import CLIENT_STYLES, PUBLIC_STYLES
from emoji_texts import CLIENT_QUESTIONS, LANGUAGES, NEUTRAL_QUESTIONS, TASKS, Concept
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SPLITS = Path(__file__).with_name("emoji_splits.json")

NEAR_CLIENT = 16.0
"""A public picture closer than this (RMS grey levels) to any client's picture is left out of the public corpus."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = (
    *("ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"),
    *("client", "split", "language", "concept", "task", "group", "question_neutral", "question_client"),
)
"""RLAIF-V's columns in its order, then this project's."""

Pictures = dict[str, dict[str, np.ndarray]]
"""Style name -> code point -> uint8 [64, 64, 3]."""


@dataclass(frozen=True)
class Build:
    """Where things come from and go to."""

    cache: Path = ROOT / "build" / "emoji" / "packages"
    """Folder for the downloaded packages."""
    public: Path = ROOT / "build" / "emoji" / "public.parquet"
    """The public corpus; its licences (CC-BY-SA among them) keep it out of the package."""
    shipped: Path = ROOT / "src" / "fedvlm_jax" / "assets" / "emoji" / "emoji.parquet"
    """The set that ships."""
    sheet: Path = ROOT / "build" / "contact.png"
    """Contact sheet to look at."""
    fix_splits: bool = False
    """Draw and write the split list instead of reading the committed one."""


def encode_sprite(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> lossless WebP."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def draw_all(cache: Path, concepts: dict[str, Concept]) -> Pictures:
    """Every style's pictures of the concepts, without blanks and without pictures filed under two names."""
    labels = {code: concept.names["en"]["label"] for code, concept in concepts.items()}
    kept = set(emoji_concepts.choose_concepts(list(concepts)))
    pictures = {}
    for style in (*CLIENT_STYLES, *PUBLIC_STYLES):
        # Matching sees all names, so that a dropped variant cannot lend its picture to the one that stays.
        drawn = emoji_sources.draw_style(style, cache, labels)
        pictures[style.name] = emoji_concepts.drop_shared({code: drawn[code] for code in drawn if code in kept})
    return pictures


def fix_splits(pictures: Pictures, concepts: dict[str, Concept]) -> dict[str, str]:
    """Concept -> split, drawn from the seed; families are kept whole."""
    twins = [p for drawn in pictures.values() for p in emoji_concepts.find_twins(drawn, emoji_concepts.SAME_PICTURE)]
    codes = sorted(set().union(*pictures.values()))
    families = emoji_concepts.group_families(codes, twins)
    return emoji_concepts.split_concepts(families, {code: concepts[code].subgroup for code in codes})


def measure_nearest(pictures: Pictures, styles: list[str]) -> dict[tuple[str, str], float]:
    """(public style, concept) -> RMS distance to the nearest picture of any client style, of any concept."""
    clients = np.concatenate([np.stack([*pictures[s.name].values()]) for s in CLIENT_STYLES]).reshape(-1, 64 * 64 * 3)
    nearest = {}
    for style in styles:
        drawn = pictures[style]
        flat = np.stack([*drawn.values()]).reshape(len(drawn), -1)
        distances = emoji_concepts.measure_rms(flat, clients).min(axis=1)
        nearest |= {(style, code): float(distance) for code, distance in zip(drawn, distances, strict=True)}
    return nearest


def write_public(path: Path, pictures: Pictures, concepts: dict[str, Concept], splits: dict[str, str]) -> dict:
    """Write the public corpus (train concepts, and validation concepts to measure on) and return its counts."""
    styles = [style.name for style in PUBLIC_STYLES]
    nearest = measure_nearest(pictures, styles)
    rows = []
    for style in styles:
        for code, pixels in sorted(pictures[style].items()):
            if splits[code] == "test" or nearest[style, code] < NEAR_CLIENT:
                continue
            concept = concepts[code]
            rows.append(
                {
                    "image": {"bytes": encode_sprite(pixels), "path": f"{style}/{code}.webp"},
                    "style": style,
                    "concept": code,
                    "split": splits[code],
                    "group": concept.group,
                    "subgroup": concept.subgroup,
                    "names": concept.names_json,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    near = Counter(style for (style, _), distance in nearest.items() if distance < NEAR_CLIENT)
    return {
        "rows": dict(sorted(Counter(f"{row['style']} {row['split']}" for row in rows).items())),
        "left out as near a client's picture": dict(sorted(near.items())),
        "nearest client picture, RMS grey levels": {
            style: dict(
                zip(
                    ("min", "p1", "p5", "median"),
                    np.percentile([d for (s, _), d in nearest.items() if s == style], [0, 1, 5, 50]).round(1).tolist(),
                    strict=True,
                )
            )
            for style in styles
        },
    }


def choose_rejected(concepts: dict[str, Concept], splits: dict[str, str]) -> dict[tuple[str, str], dict[str, str]]:
    """(concept, task) -> language -> a wrong but plausible answer.

    A wrong subgroup comes from the same group and a wrong name from the same subgroup, where there is another one. A
    wrong name also comes from the same split, so that no test concept is named in a training row.
    """
    codes = sorted(splits)
    groups = sorted({concepts[code].group for code in codes})
    subgroups = sorted({(concepts[code].subgroup, concepts[code].group) for code in codes})
    example = {key: code for code in codes for key in (concepts[code].group, concepts[code].subgroup)}
    rejected = {}
    for index, code in enumerate(codes):
        own = concepts[code]
        mates = [other for other in codes if splits[other] == splits[code] and other != code]
        # Each list holds one concept per candidate answer, the plausible ones in the first of two tiers.
        tiers = {
            "group": ([example[key] for key in groups if key != own.group], []),
            "subgroup": (
                [example[key] for key, group in subgroups if group == own.group and key != own.subgroup],
                [example[key] for key, group in subgroups if group != own.group],
            ),
            "name": (
                [other for other in mates if concepts[other].subgroup == own.subgroup],
                [other for other in mates if concepts[other].group == own.group],
            ),
        }
        for number, task in enumerate(TASKS):
            rng = np.random.default_rng([emoji_concepts.SEED, index, number])
            order = [other for tier in tiers[task] for other in rng.permutation(tier).tolist()]
            rejected[code, task] = {
                language: next(
                    answer
                    for other in order
                    if (answer := give_answer(concepts[other], task, language)) != give_answer(own, task, language)
                )
                for language in LANGUAGES
            }
    return rejected


def give_answer(concept: Concept, task: str, language: str) -> str:
    return concept.names[language]["label" if task == "name" else task]


def make_rows(pictures: Pictures, concepts: dict[str, Concept], splits: dict[str, str]) -> dict[str, list]:
    """Columns of the shipped set: every concept × client × task, ordered by client, concept, task."""
    rejected = choose_rejected(concepts, splits)
    columns = {name: [] for name in COLUMNS}
    for style in CLIENT_STYLES:
        sprites = {code: encode_sprite(pixels) for code, pixels in sorted(pictures[style.name].items())}
        for language in LANGUAGES:
            client = f"{style.name}-{language}"
            origin = json.dumps({"type": "question answering", "language": language})
            for code, sprite in sprites.items():
                path = f"{style.name}/{code}.webp"
                for number, task in enumerate(TASKS):
                    row = {
                        "ds_name": "fedvlm-emoji",
                        "image": {"bytes": sprite, "path": path},
                        "question": NEUTRAL_QUESTIONS[task],
                        "chosen": give_answer(concepts[code], task, language),
                        "rejected": rejected[code, task][language],
                        "origin_dataset": style.package.split("/")[-1],
                        "origin_split": origin,
                        "idx": f"{client}/{code}/{task}",
                        "image_path": path,
                        "client": client,
                        "split": splits[code],
                        "language": language,
                        "concept": code,
                        "task": task,
                        "group": concepts[code].group,
                        "question_neutral": NEUTRAL_QUESTIONS[task],
                        "question_client": CLIENT_QUESTIONS[language][number],
                    }
                    for name, values in columns.items():
                        values.append(row[name])
    return columns


def write_shipped(path: Path, columns: dict[str, list]) -> None:
    """Write the columns as one row group whose dictionaries hold every sprite and every text once.

    The metadata names the image column to Hugging Face's `datasets`, which then decodes it.
    """
    features = {name: {"dtype": "string", "_type": "Value"} for name in COLUMNS} | {"image": {"_type": "Image"}}
    fields = [pa.field(name, IMAGE if name == "image" else pa.string()) for name in COLUMNS]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns, schema=pa.schema(fields, metadata=metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        row_group_size=table.num_rows,
        # The default limit of 1 MiB would give up on the dictionary and store a sprite once per row.
        dictionary_pagesize_limit=64 * 2**20,
        use_dictionary=["image.bytes", "image.path", *(name for name in COLUMNS if name not in ("image", "idx"))],
        column_encoding={"idx": "DELTA_BYTE_ARRAY"},
        compression="zstd",
        compression_level=19,
    )


def draw_sheet(path: Path, pictures: Pictures, splits: dict[str, str], count: int = 22) -> None:
    """Contact sheet: a row per style, a column per concept, the same concepts for all; grey where a style has none."""
    everywhere = sorted(set.intersection(*(set(drawn) for drawn in pictures.values())))
    some = np.random.default_rng(emoji_concepts.SEED).choice(sorted(splits), size=6, replace=False).tolist()
    codes = everywhere[:: len(everywhere) // (count - 6)][: count - 6] + some
    blank = np.full((emoji_sources.SIZE, emoji_sources.SIZE, 3), 200, np.uint8)
    rows = [np.hstack([drawn.get(code, blank) for code in codes]) for drawn in pictures.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(rows)).save(path)


def count_rows(columns: dict[str, list]) -> dict:
    """What the data card states: images by vendor and split, clients, pictures that two splits share."""
    images, owners = {}, defaultdict(set)
    for image, split in zip(columns["image"], columns["split"], strict=True):
        images[image["path"]] = split
        owners[image["bytes"]].add(split)
    return {
        "rows": len(columns["idx"]),
        "clients": len(set(columns["client"])),
        "concepts": dict(
            sorted(Counter(dict(zip(columns["concept"], columns["split"], strict=True)).values()).items())
        ),
        "images": dict(sorted(Counter(f"{path.split('/')[0]} {split}" for path, split in images.items()).items())),
        "pictures in more than one split": sum(len(splits) > 1 for splits in owners.values()),
    }


def main(build: Build) -> None:
    texts = emoji_sources.open_package(emoji_sources.TEXTS, build.cache)
    concepts = emoji_texts.read_concepts(texts)
    pictures = draw_all(build.cache, concepts)
    if build.fix_splits:
        splits = fix_splits(pictures, concepts)
        SPLITS.write_text(json.dumps(splits, indent=0) + "\n", encoding="utf-8")
    splits = emoji_sources.read_json(SPLITS)
    if missing := sorted(set().union(*pictures.values()) - set(splits)):
        raise KeyError(f"{SPLITS.name} has no split for {missing}; it belongs to other package versions")
    columns = make_rows(pictures, concepts, splits)
    write_shipped(build.shipped, columns)
    draw_sheet(build.sheet, pictures, splits)
    report = {
        "shipped": count_rows(columns) | {"bytes": build.shipped.stat().st_size},
        "public": write_public(build.public, pictures, concepts, splits),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Build))
