"""Writes golden_texts.json, what reference implementations say of fixed sentences.

In an environment of its own, with Java for the Penn treebank's tokens:

    pip install pycocoevalcap==1.2 rouge-score==0.1.2 && python tests/evaluation/make_golden.py

Ordinary tests hold our metrics to the file, and a live comparison calls `rouge` (rouge-score is in the extra `parity`;
pycocoevalcap is not, for it brings 100 MB of Java).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

Cases = list[tuple[str, list[str]]]

FILE = Path(__file__).with_name("golden_texts.json")

# (prediction, gold answers): alike and unlike, short and long, with repeats, contractions, hyphens and figures.
CASES: Cases = [
    (
        "A brown dog is running across the green field.",
        [
            "A brown dog runs across a grassy field.",
            "The dog is running through the green grass.",
            "A dog running across a field with a ball in its mouth.",
        ],
    ),
    (
        "Two children are playing football in the park.",
        ["Two kids play football in a park.", "Children are playing soccer on the grass in the park."],
    ),
    ("A red bus", ["A red double-decker bus is parked on the street next to a tall brick building."]),
    (
        "A man in a blue shirt is riding a motorcycle down a busy street, and it's raining.",
        [
            "A man rides a motorcycle on a street.",
            "A motorcyclist in a blue shirt riding down the busy street.",
            "It's raining while a man is riding a motorcycle down a busy street.",
        ],
    ),
    ("dog dog dog dog dog dog", ["A dog and another dog are sleeping on the sofa.", "Two dogs asleep on a sofa."]),
    ("", ["A plate of food with rice, beans and a slice of lemon."]),
    (
        "The image shows a kitchen with a stove, a refrigerator and a wooden table.",
        ["The image shows a kitchen with a stove, a refrigerator and a wooden table."],
    ),
    (
        'The sign says "STOP" and there aren\'t any cars.',
        ["There is a stop sign at the corner and there aren't any cars.", "A stop sign that isn't clean."],
    ),
    ("Yes", ["yes", "Yes, it is.", "No"]),
    (
        "It was taken in 1995, at 3.5 miles from the well-known harbour; about 18,000 families live there.",
        [
            "The picture was taken in 1995 at a well-known harbour.",
            "About 18,000 families live near the harbour, which is 3.5 miles away.",
        ],
    ),
    (
        "A table table setting with with food food on a table.",
        ["A table with food on it.", "A table setting with plates of food.", "Food on a table."],
    ),
    (
        "A cat.",
        ["A black cat is lying on the window sill of an old house and is looking at the birds in the garden."],
    ),
]

ARTICLES = ("a", "an", "the")


def split_words(text: str) -> list[str]:
    """Runs of ASCII letters and digits: what rouge-score takes for words."""
    return re.findall("[a-z0-9]+", text.lower())


def rouge(cases: Cases) -> dict[str, list[float]]:
    """F1 of ROUGE-1 and of ROUGE-L, the best gold answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"])
    found = [scorer.score_multi(golds, prediction) for prediction, golds in cases]
    return {name: [float(one[name].fmeasure) for one in found] for name in ("rouge1", "rougeL")}


def cider(cases: Cases) -> list[float]:
    """CIDEr-D of texts whose words stand between spaces."""
    from pycocoevalcap.cider.cider import Cider

    places = range(len(cases))
    _, scores = Cider().compute_score({n: cases[n][1] for n in places}, {n: [cases[n][0]] for n in places})
    return [float(score) for score in scores]


def join_words(cases: Cases, without: tuple[str, ...] = ()) -> Cases:
    """The same cases, their words between spaces."""

    def join(text: str) -> str:
        return " ".join(word for word in split_words(text) if word not in without)

    return [(join(one), [join(gold) for gold in golds]) for one, golds in cases]


def join_treebank(cases: Cases) -> Cases:
    """The same cases, the Penn treebank's tokens between spaces, as COCO's caption server makes them (in Java)."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    both = []
    for texts in ([[prediction] for prediction, _ in cases], [golds for _, golds in cases]):
        asked = {n: [{"caption": text} for text in one] for n, one in enumerate(texts)}
        both.append(PTBTokenizer().tokenize(asked))
    return [(both[0][n][0], both[1][n]) for n in range(len(cases))]


if __name__ == "__main__":
    found = {
        "versions": {name: importlib.metadata.version(name) for name in ("pycocoevalcap", "rouge-score")},
        "cases": CASES,
        "rougeL": rouge(CASES)["rougeL"],
        # Without articles, and with nothing to delete inside words, SQuAD's F1 is that of ROUGE-1.
        "f1": rouge(join_words(CASES, ARTICLES))["rouge1"],
        "cider": cider(join_words(CASES)),
        "cider_treebank": cider(join_treebank(CASES)),
    }
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
