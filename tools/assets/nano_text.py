"""Second phase: the text half learns to answer questions on the frozen tower's features of augmented pictures."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import nano_augment
import numpy as np
from emoji_texts import CLIENT_QUESTIONS, NEUTRAL_QUESTIONS
from nano_corpus import Corpus, draw_pair
from nano_training import Pretrain, spread_kernels, train

PROMPT_LENGTH, ANSWER_LENGTH = 34, 14
IGNORED = -100


def feature_copies(run: Pretrain, vlm: Any, params: dict, corpus: Corpus, copies: int) -> np.ndarray:
    """float16 [copies, N, P, D]: features of the pictures, the first copy as they are, the others augmented."""
    file = run.state / f"features-{sum(run.vision_steps)}-{copies}-{len(corpus.pixels)}.npy"
    if file.is_file():
        return np.load(file)
    extract = jax.jit(partial(vlm.image_features, params, None))
    out = []
    for copy in range(copies):
        rng = np.random.default_rng([run.seed, 11, copy])
        parts = []
        for start in range(0, len(corpus.pixels), 100):
            pixels = corpus.pixels[start : start + 100]
            images = nano_augment.augment(rng, pixels, 0.8) if copy else nano_augment.normalize(pixels)
            padded = np.concatenate([images, np.zeros((100 - len(images), *images.shape[1:]), np.float32)])
            parts.append(np.asarray(extract(padded))[: len(images)].astype(np.float16))
        out.append(np.concatenate(parts))
    features = np.stack(out)
    np.save(file, features)
    return features


def encode_pairs(processor: Any, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Prompts [B, image tokens + PROMPT_LENGTH] and labels [B, ANSWER_LENGTH] as the processor makes them."""
    ids, mask = processor.prompts([question for question, _ in pairs])
    labels = processor.answers([answer for _, answer in pairs], ANSWER_LENGTH)
    missing = processor.image_tokens + PROMPT_LENGTH - ids.shape[1]
    return {
        "input_ids": np.pad(ids, ((0, 0), (0, missing))),
        "attention_mask": np.pad(mask, ((0, 0), (0, missing))),
        "labels": np.pad(labels, ((0, 0), (0, ANSWER_LENGTH - labels.shape[1])), constant_values=IGNORED),
    }


def train_text(run: Pretrain, vlm: Any, params: dict, processor: Any, corpus: Corpus, valid: Corpus) -> dict:
    """The text half after learning to answer on the frozen features."""
    features = feature_copies(run, vlm, params, corpus, run.copies)
    unseen = feature_copies(run, vlm, params, valid, 1)[0]

    def loss(text: Any, batch: dict) -> tuple[Any, dict]:
        logits = vlm.logits({"language_model": text}, None, batch)
        labels = batch["labels"]
        chosen = jnp.sum(logits * jax.nn.one_hot(labels, logits.shape[-1]), -1)
        each = jax.nn.logsumexp(logits, axis=-1) - 0.95 * chosen - 0.05 * logits.mean(-1)
        counted = (labels != IGNORED).astype(jnp.float32)
        value = jnp.sum(each * counted) / counted.sum()
        right = jnp.all((jnp.argmax(logits, -1) == labels) | (labels == IGNORED), axis=1)
        return value, {"loss": value, "train_exact": right.mean(dtype=jnp.float32)}

    def batches(rng: np.random.Generator, number: int) -> tuple:
        rows = rng.integers(0, len(corpus.names), run.text_batch)
        batch = encode_pairs(processor, [draw_pair(rng, corpus.names[row]) for row in rows])
        seen = features[rng.integers(0, run.copies, run.text_batch), rows].astype(np.float32)
        seen += rng.normal(0, 0.15, seen.shape).astype(np.float32)
        seen *= rng.random((*seen.shape[:2], 1)) > 0.1  # whole image tokens dropped
        return ({**batch, "image_features": seen},)

    rng = np.random.default_rng(run.seed)
    rows = np.arange(len(valid.names))
    pairs = [(NEUTRAL_QUESTIONS["subgroup"], valid.names[row]["en"]["subgroup"]) for row in rows]
    pairs += [(q[1], valid.names[row][language]["subgroup"]) for row in rows for language, q in [_draw_language(rng)]]
    check = encode_pairs(processor, pairs) | {"image_features": np.concatenate([unseen, unseen])}
    forced = jax.jit(lambda text, batch: loss(text, batch)[1]["train_exact"])

    def evaluate(text: Any) -> dict:
        """Teacher-forced exact match of subgroups, a quick stand-in for generation."""
        halves = [{key: value[part] for key, value in check.items()} for part in np.split(np.arange(len(pairs)), 2)]
        return {
            f"valid_{name}": float(forced(text, half)) for name, half in zip(("neutral", "own"), halves, strict=True)
        }

    text = spread_kernels(params["language_model"])
    for cycle, steps in enumerate(run.text_steps):
        drawn = sum(run.text_steps[:cycle])
        text = train(run, f"text{cycle}", text, steps, run.text_rate, loss, batches, evaluate, drawn)
    return {**params, "language_model": text}


def _draw_language(rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    language = str(rng.choice(list(CLIENT_QUESTIONS)))
    return language, CLIENT_QUESTIONS[language]
