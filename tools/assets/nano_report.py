"""Measure a nano model as it lies in its folder, and write the figures into its model card.

    python tools/assets/nano_report.py
    python tools/assets/nano_report.py --model smolvlm-nano     # of CLIP-nano: clip_report.py

Greedy generation from images and questions, exact match of normalised answers, on validation concepts, none of which
the model has seen in any style: in the public styles (which it trained on) and in the client vendors' (which it never
saw). Asked neutrally (answer in English) and in each language. Chance is the share of the most frequent answer.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow.parquet as pq
import tyro
from emoji_texts import CLIENT_QUESTIONS, LANGUAGES, NEUTRAL_QUESTIONS, TASKS
from nano_augment import normalize
from nano_corpus import decode
from nano_text import encode_pairs
from nano_training import ROOT

from fedvlm_jax.models import load_weights, open_model

BATCH = 512
MARK = "<!-- figures -->"


@dataclass(frozen=True)
class Report:
    """What is measured and where it is written."""

    model: Literal["florence2-nano", "smolvlm-nano"] = "florence2-nano"
    assets: Path = ROOT / "src" / "fedvlm_jax" / "assets"
    public: Path = ROOT / "build" / "emoji" / "public.parquet"
    shipped: Path = ROOT / "src" / "fedvlm_jax" / "assets" / "emoji" / "emoji.parquet"
    limit: int = 0
    """Pictures per style; 0 is all of them."""
    write: bool = True
    """Put the figures into the folder's README.md."""

    @property
    def folder(self) -> Path:
        return self.assets / self.model


@dataclass(frozen=True)
class Picture:
    """A validation picture: its style, pixels and names by language."""

    style: str
    pixels: np.ndarray
    names: dict[str, dict[str, str]]


def load_pictures(report: Report) -> list[Picture]:
    """Validation pictures of the public styles and of the clients', once each."""
    rows = pq.read_table(report.public, filters=[("split", "=", "validation")]).to_pylist()
    pictures = [Picture(row["style"], decode(row["image"]["bytes"]), json.loads(row["names"])) for row in rows]
    names: dict[tuple[str, str], dict] = defaultdict(lambda: defaultdict(dict))
    images: dict[tuple[str, str], bytes] = {}
    columns = ["image", "origin_dataset", "concept", "language", "task", "chosen"]
    for row in pq.read_table(report.shipped, columns=columns, filters=[("split", "=", "validation")]).to_pylist():
        key = (row["origin_dataset"], row["concept"])
        images[key] = row["image"]["bytes"]
        names[key][row["language"]]["label" if row["task"] == "name" else row["task"]] = row["chosen"]
    pictures += [Picture(key[0], decode(images[key]), names[key]) for key in sorted(images)]
    if report.limit:
        kept: Counter[str] = Counter()
        chosen = []
        for picture in pictures:
            kept[picture.style] += 1
            if kept[picture.style] <= report.limit:
                chosen.append(picture)
        return chosen
    return pictures


def extract_features(vlm: Any, params: Any, pictures: list[Picture]) -> np.ndarray:
    """float32 [N, P, D], in batches of one shape."""
    extract = jax.jit(partial(vlm.image_features, params, None))
    parts = []
    for start in range(0, len(pictures), 100):
        pixels = normalize(np.stack([picture.pixels for picture in pictures[start : start + 100]]))
        padded = np.concatenate([pixels, np.zeros((100 - len(pixels), *pixels.shape[1:]), np.float32)])
        parts.append(np.asarray(extract(padded))[: len(pixels)])
    return np.concatenate(parts)


class Answerer:
    """Generates answers to (row, question) pairs, in batches of one shape."""

    def __init__(self, vlm: Any, params: Any, processor: Any, features: np.ndarray) -> None:
        self.processor, self.features = processor, features
        self.run = jax.jit(lambda batch: vlm.generate(params, None, batch, 18))

    def answer(self, rows: Iterable[int], question: str) -> list[str]:
        rows, answers = list(rows), []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            padded = part + part[:1] * (BATCH - len(part))
            batch = encode_pairs(self.processor, [(question, "")] * BATCH)
            batch.pop("labels")
            tokens = np.asarray(self.run({**batch, "image_features": self.features[padded]}))[: len(part)]
            answers += self.processor.decode(tokens)
        return answers


def normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def measure(report: Report) -> dict[str, Any]:
    """Accuracies by question language (``neutral`` among them), task and style, and what chance would give."""
    vlm, processor = open_model(report.folder)
    params = load_weights(vlm, report.folder)
    pictures = load_pictures(report)
    answerer = Answerer(vlm, params, processor, extract_features(vlm, params, pictures))
    styles = sorted({picture.style for picture in pictures})
    rows_of = {style: [i for i, p in enumerate(pictures) if p.style == style] for style in styles}
    accuracy: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    chance: dict[str, float] = {}
    for asked in ("neutral", *LANGUAGES):
        language = "en" if asked == "neutral" else asked
        for task in TASKS if asked == "neutral" else TASKS[:2]:
            field = "label" if task == "name" else task
            question = NEUTRAL_QUESTIONS[task] if asked == "neutral" else CLIENT_QUESTIONS[asked][TASKS.index(task)]
            given = answerer.answer(range(len(pictures)), question)
            truth = [picture.names[language][field] for picture in pictures]
            right = np.array([normalise(a) == normalise(b) for a, b in zip(given, truth, strict=True)])
            accuracy[asked][task] = {style: float(right[rows].mean()) for style, rows in rows_of.items()}
            chance.setdefault(task, max(Counter(truth).values()) / len(truth))
    return {"accuracy": accuracy, "chance": chance, "pictures": {style: len(rows_of[style]) for style in styles}}


def format_figures(figures: dict[str, Any], unseen: tuple[str, ...]) -> str:
    """Two Markdown tables: neutral questions by style, and every language averaged over seen and unseen styles."""
    styles = [s for s in figures["pictures"] if s not in unseen] + [s for s in figures["pictures"] if s in unseen]
    lines = ["| style | trained on | pictures | group | subgroup | name |", "|---|---|---|---|---|---|"]
    for style in styles:
        cells = [f"{figures['accuracy']['neutral'][task][style]:.3f}" for task in TASKS]
        known = "no" if style in unseen else "yes"
        lines.append(f"| {style} | {known} | {figures['pictures'][style]} | {' | '.join(cells)} |")
    chance = [f"{figures['chance'][task]:.3f}" for task in TASKS]
    lines.append(f"| *most frequent answer* | | | {' | '.join(chance)} |")
    lines += ["", "| question | group, public | group, clients' | subgroup, public | subgroup, clients' |"]
    lines.append("|---|---|---|---|---|")
    for asked, tasks in figures["accuracy"].items():
        cells = []
        for task in ("group", "subgroup"):
            for part in (lambda s: s not in unseen, lambda s: s in unseen):
                cells.append(f"{np.mean([value for style, value in tasks[task].items() if part(style)]):.3f}")
        lines.append(f"| {asked} | {' | '.join(cells)} |")
    return "\n".join(lines)


def list_public_styles(report: Report) -> set[str]:
    """Styles of the corpus that pre-training reads."""
    return set(pq.read_table(report.public, columns=["style"])["style"].to_pylist())


def write_figures(folder: Path, text: str) -> None:
    """Put figures between the marks of a folder's model card."""
    card = folder / "README.md"
    before, _, after = card.read_text().partition(MARK)
    _, _, after = after.partition(MARK)
    card.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


def main(report: Report) -> None:
    figures = measure(report)
    public = list_public_styles(report)
    text = format_figures(figures, tuple(style for style in figures["pictures"] if style not in public))
    print(text)
    if report.write:
        write_figures(report.folder, text)


if __name__ == "__main__":
    main(tyro.cli(Report))
