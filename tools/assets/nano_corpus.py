"""The public corpus as arrays: pictures, classes, and the (question, answer) pairs that the text half learns."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from emoji_texts import CLIENT_QUESTIONS, LANGUAGES, NEUTRAL_QUESTIONS, TASKS
from PIL import Image

PARAPHRASES = {
    "group": ("Which group does this belong to?", "Name the group."),
    "subgroup": ("What kind of thing can you see?", "Name the category."),
    "name": ("What does the image describe?", "Name it."),
}
"""More ways to ask without giving a language away; the answers are English. `What does the image describe?` is what
Florence-2's processor makes of <CAPTION>."""

KEYWORD_QUESTIONS = ("Which words describe this?", "Describe in detail what is shown in the image.")
"""Answered by English name, keywords and category; the second is what the processor makes of <DETAILED_CAPTION>."""

TASK_WEIGHTS = {"group": 0.30, "subgroup": 0.52, "name": 0.14, "keywords": 0.04}
NEUTRAL_SHARE = 0.15
"""Of the examples, how many ask neutrally and are answered in English."""


@dataclass(frozen=True)
class Corpus:
    """Rows of one split: pixels uint8 [N, 64, 64, 3]; integer classes [N]; tag targets [N, tags]; texts by language."""

    pixels: np.ndarray
    group: np.ndarray
    subgroup: np.ndarray
    concept: np.ndarray
    tags: np.ndarray
    names: list[dict]
    peers: list[np.ndarray]
    """For every row, the rows that show the same concept (itself among them)."""


@dataclass(frozen=True)
class Classes:
    """The class names, in the order of their numbers; concepts and tags are those of the training rows."""

    groups: list[str]
    subgroups: list[str]
    concepts: list[str]
    tags: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "group": len(self.groups),
            "subgroup": len(self.subgroups),
            "concept": len(self.concepts),
            "tags": len(self.tags),
        }


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def load_corpus(path: Path) -> tuple[Classes, Corpus, Corpus]:
    """Classes, training rows and validation rows (other concepts, same styles) of the public corpus."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["names"] = json.loads(row["names"])
    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "validation"]
    by_concept = {row["concept"]: row for row in train}
    counts = Counter(tag for row in by_concept.values() for tag in set(row["names"]["en"]["tags"]))
    classes = Classes(
        groups=sorted({row["group"] for row in rows}),
        subgroups=sorted({row["subgroup"] for row in rows}),
        concepts=sorted(by_concept),
        tags=sorted(tag for tag, count in counts.items() if count >= 3),
    )
    return classes, _to_arrays(train, classes), _to_arrays(valid, classes)


def _to_arrays(rows: list[dict], classes: Classes) -> Corpus:
    index = {name: i for i, name in enumerate(classes.concepts)}
    tag_index = {name: i for i, name in enumerate(classes.tags)}
    concept = np.array([index.get(row["concept"], -1) for row in rows])
    tags = np.zeros((len(rows), len(classes.tags)), np.float32)
    for line, row in zip(tags, rows, strict=True):
        known = [tag_index[tag] for tag in set(row["names"]["en"]["tags"]) if tag in tag_index]
        line[known] = 1 / max(len(known), 1)
    return Corpus(
        pixels=np.stack([decode(row["image"]["bytes"]) for row in rows]),
        group=np.array([classes.groups.index(row["group"]) for row in rows]),
        subgroup=np.array([classes.subgroups.index(row["subgroup"]) for row in rows]),
        concept=concept,
        tags=tags,
        names=[row["names"] for row in rows],
        peers=[np.flatnonzero(concept == number) for number in concept],
    )


def draw_epoch(seed: int, count: int, size: int, number: int) -> np.ndarray:
    """Rows of batch ``number``: every epoch goes through all ``count`` rows in an order of its own."""
    per_epoch = count // size
    order = np.random.default_rng([seed, 7, number // per_epoch]).permutation(count)
    return order[number % per_epoch * size :][:size]


def draw_pair(rng: np.random.Generator, names: dict) -> tuple[str, str]:
    """A question about a picture, and its answer in the question's language (English where it gives none away)."""
    task = rng.choice(list(TASK_WEIGHTS), p=list(TASK_WEIGHTS.values()))
    english = names["en"]
    if task == "keywords":
        words = [english["label"], *rng.permutation(english["tags"])[:3], english["subgroup"]]
        return str(rng.choice(KEYWORD_QUESTIONS)), ", ".join(map(str, words))
    field = "label" if task == "name" else task
    if rng.random() < NEUTRAL_SHARE:
        asked = NEUTRAL_QUESTIONS[task] if rng.random() < 0.7 else str(rng.choice(PARAPHRASES[task]))
        return asked, english[field]
    language = str(rng.choice(LANGUAGES))
    return CLIENT_QUESTIONS[language][TASKS.index(task)], names[language][field]
