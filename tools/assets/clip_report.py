"""Measure CLIP-nano as it lies in its folder, before and after pre-training, and write the figures into its card.

    python tools/assets/clip_report.py

Zero-shot top-1 on validation concepts, none of which it has seen in any style: in the public styles, which it trained
on, and for every client of the shipped set, whose styles it never saw. Asked among all groups or all subgroups in the
client's language, or among the names of all validation concepts. "Before" are the random weights of seed 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import tyro
from emoji_texts import LANGUAGES, TASKS
from nano_contrast import embed
from nano_report import BATCH, Report, extract_features, list_public_styles, load_pictures, write_figures

from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.models import load_weights, open_model
from fedvlm_jax.models.clip.model import make_module

SEED = 0


@dataclass(frozen=True)
class Clip(Report):
    """What is measured and where it is written."""

    model: Literal["clip-nano"] = "clip-nano"


@dataclass(frozen=True)
class Measured:
    """Top-1 by (style, language, task); and by task of how many classes, and how often the commonest is right."""

    right: dict[tuple[str, str, str], float]
    classes: dict[str, int]
    commonest: dict[str, float]


def list_classes(report: Report) -> dict[tuple[str, str], list[str]]:
    """(language, task) -> answers: all of groups and of subgroups, and the names of validation concepts."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    columns = ["split", "language", "task", "chosen"]
    for row in pq.read_table(report.shipped, columns=columns, read_dictionary=columns).to_pylist():
        if row["task"] != "name" or row["split"] == "validation":
            found[row["language"], row["task"]].add(row["chosen"])
    return {key: sorted(answers) for key, answers in found.items()}


def score_zero_shot(vlm: Any, params: Any, processor: Any, report: Report) -> Measured:
    """Top-1 of every validation picture in every language, each task among its own classes."""
    pictures, classes = load_pictures(report), list_classes(report)
    images = extract_features(vlm, params, pictures)[:, 0]
    texts = embed_texts(
        vlm.config, params, processor, sorted({text for answers in classes.values() for text in answers})
    )
    right, commonest = {}, {}
    for (language, task), answers in classes.items():
        truth = [picture.names[language]["label" if task == "name" else task] for picture in pictures]
        scores = images @ np.stack([texts[answer] for answer in answers]).T  # the length of `images` decides nothing
        hits = defaultdict(list)
        for picture, number, wanted in zip(pictures, scores.argmax(1), truth, strict=True):
            hits[picture.style].append(answers[number] == wanted)
        right |= {(style, language, task): float(np.mean(values)) for style, values in hits.items()}
        commonest[task] = max(Counter(truth).values()) / len(truth)
    return Measured(right, {task: len(classes["en", task]) for task in TASKS}, commonest)


def embed_texts(config: Any, params: Any, processor: Any, texts: list[str]) -> dict[str, np.ndarray]:
    """Text -> embedding [E] in the default prompt, computed in batches of one shape."""
    run = jax.jit(partial(embed, make_module(config, jnp.float32), params, method="text_features"))
    asked = processor.bind(texts, DataOptions.class_prompt)
    ids = asked.prompt_ids
    parts = []
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0)), mode="edge")
        parts.append(np.asarray(run(padded))[: len(part)])
    return dict(zip(asked.classes, np.concatenate(parts), strict=True))


def tabulate(before: Measured, after: Measured, counts: dict[str, int], public: set[str]) -> str:
    """Two Markdown tables: English by style, and subgroups by client, each with what random weights give."""
    styles = sorted(counts, key=lambda style: (style not in public, style))
    heads = " | ".join(f"{task} (of {after.classes[task]})" for task in TASKS)
    lines = [f"| style, asked in English | trained on | pictures | {heads} |", "|---|---|---|---|---|---|"]
    for style in styles:
        cells = " | ".join(_compare(before, after, (style, "en", task)) for task in TASKS)
        lines.append(f"| {style} | {'yes' if style in public else 'no'} | {counts[style]} | {cells} |")
    often = " | ".join(f"{after.commonest[task]:.3f}" for task in TASKS)
    lines.append(f"| *most frequent answer* | | | {often} |")
    clients = [style for style in styles if style not in public]
    lines += ["", f"| subgroup, asked in | {' | '.join(clients)} |", f"|---|{'---|' * len(clients)}"]
    for language in LANGUAGES:
        cells = " | ".join(_compare(before, after, (style, language, "subgroup")) for style in clients)
        lines.append(f"| {language} | {cells} |")
    return "\n".join(lines)


def _compare(before: Measured, after: Measured, key: tuple[str, str, str]) -> str:
    return f"{before.right[key]:.3f} → {after.right[key]:.3f}"


def main(report: Clip) -> None:
    vlm, processor = open_model(report.folder)
    weights = jax.jit(vlm.init)(jax.random.key(SEED)), load_weights(vlm, report.folder)
    before, after = (score_zero_shot(vlm, params, processor, report) for params in weights)
    counts = Counter(picture.style for picture in load_pictures(report))
    text = tabulate(before, after, counts, list_public_styles(report))
    print(text)
    if report.write:
        write_figures(report.folder, text)


if __name__ == "__main__":
    main(tyro.cli(Clip))
