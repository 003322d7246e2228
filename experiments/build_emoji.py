# /// script
# requires-python = ">=3.11"
# dependencies = ["resvg-py==0.5.0", "numpy>=2,<3", "pillow>=11,<13", "pyarrow>=20", "tyro>=1,<2"]
# ///
"""Build the emoji data: the set that ships with its clients, and the public corpus for pre-training.

    python experiments/build_emoji.py                 # both, from the committed splits
    python experiments/build_emoji.py --fix-splits    # draw the splits anew first (only before any pre-training)

Needs npm on the path for the packages and resvg-py for the pictures; using the built files needs neither. The same
packages and library versions give the same bytes.
"""

import hashlib
import io
import json
from collections import Counter
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

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ROOT / "experiments" / "emoji_splits.json"

NEAR_CLIENT = 16.0
"""A public picture closer than this (RMS grey levels) to any client's picture is left out of the public corpus."""

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
    print(json.dumps(write_public(build.public, pictures, concepts, splits), indent=2))


if __name__ == "__main__":
    main(tyro.cli(Build))
