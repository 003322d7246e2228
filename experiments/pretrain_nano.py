"""Pre-train Florence2-nano on the public emoji corpus, from random weights to the folder that ships.

    python experiments/build_emoji.py          # the corpus, once
    python experiments/pretrain_nano.py        # vision, text, folder; killed and started again, it resumes
    python experiments/nano_report.py          # how good it is, into the model card

Only training concepts in public styles are learned from; validation concepts in public styles choose nothing but are
logged; the clients' pictures are not read here. First the vision tower and the projector learn to tell groups,
subgroups, concepts and English keywords apart, with linear heads that are thrown away. Then the text half learns to
answer questions on the frozen tower's features of several augmented copies of every picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nano_augment
import nano_tokenizer
import numpy as np
import optax
import pyarrow.parquet as pq
import tyro
from emoji_texts import CLIENT_QUESTIONS, NEUTRAL_QUESTIONS
from flax import serialization
from nano_corpus import Classes, Corpus, draw_pair, load_corpus
from nano_speed import keep_heap, with_cheap_gradient
from transformers import AutoTokenizer

from fedvlm_jax.models import build, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
HEAD_WEIGHTS = {"group": 0.5, "subgroup": 1.0, "concept": 0.4, "tags": 0.3}
REPEATED_WEIGHT = 0.02  # against features that collapse into a few directions
HEAD_SPEED = 2.0  # heads learn this much faster than the tower
PROMPT_LENGTH, ANSWER_LENGTH = 26, 14
IGNORED = -100


@dataclass(frozen=True)
class Pretrain:
    """Where things are and how long to train."""

    corpus: Path = ROOT / "build" / "emoji" / "public.parquet"
    work: Path = ROOT / "build" / "pretrain"
    """Checkpoints and log.jsonl."""
    folder: Path = ROOT / "src" / "fedvlm_jax" / "assets" / "florence2-nano"
    seed: int = 0
    vision_steps: int = 1500
    vision_batch: int = 32
    vision_rate: float = 4e-4
    strength: float = 0.8
    """Of the augmentation in the vision phase."""
    copies: int = 6
    """Augmented copies of every training picture whose features the text half sees."""
    text_steps: int = 1000
    text_batch: int = 64
    text_rate: float = 2e-3
    save_seconds: float = 120.0


def log(run: Pretrain, **values: Any) -> None:
    line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
    print(line, flush=True)
    with (run.work / "log.jsonl").open("a") as file:
        file.write(line + "\n")


def optimiser(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(100, steps // 10), steps, rate * 0.01)
    mask = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.995, weight_decay=0.08, mask=mask))


def make_step(loss: Callable[..., tuple[Any, dict]], rate: float, steps: int) -> Callable[..., tuple[dict, dict]]:
    """One jitted step on {params, ema, opt, step}; ``loss(params, *frozen_and_batch)`` returns a value and metrics."""
    transform = optimiser(rate, steps)

    @partial(jax.jit, donate_argnums=0)
    def step(state: dict, *inputs: Any) -> tuple[dict, dict]:
        gradients, metrics = jax.grad(loss, has_aux=True)(state["params"], *inputs)
        updates, opt = transform.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(0.998, (1.0 + state["step"]) / (10.0 + state["step"]))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state["ema"], params)
        return {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}, metrics

    return step


def train(
    run: Pretrain, phase: str, params: Any, steps: int, rate: float, loss: Any, batches: Any, evaluate: Any
) -> Any:
    """Run ``steps`` steps, resuming from the phase's checkpoint where there is one; returns the averaged weights."""
    # A copy, because the step donates its state and `params` and `ema` start as the same arrays.
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "step": jnp.zeros((), jnp.int32)}
    state["opt"] = optimiser(rate, steps).init(params)
    file = run.work / f"{phase}.msgpack"
    if file.is_file():
        state = jax.tree.map(jnp.asarray, serialization.from_bytes(state, file.read_bytes()))
    step, saved, began = make_step(loss, rate, steps), time.time(), time.time()
    first, sums = int(state["step"]), []
    log(run, phase=phase, resumed_at=first)
    for number in range(first, steps):
        inputs = batches(np.random.default_rng([run.seed, number]), number)
        if len(sums) > 1:
            jax.block_until_ready(sums[-2])  # at most one step in flight
        state, metrics = step(state, *inputs)
        sums.append(metrics)
        if (number + 1) % 50 == 0 or number + 1 == steps:
            mean = {key: float(np.mean([m[key] for m in sums])) for key in sums[0]}
            pace = 50 / (time.time() - began)
            extra = evaluate(state["ema"]) if (number + 1) % 200 == 0 or number + 1 == steps else {}
            log(run, phase=phase, step=number + 1, **mean, **extra, steps_per_s=pace, clock=time.strftime("%H:%M:%S"))
            sums, began = [], time.time()
        if time.time() - saved > run.save_seconds or number + 1 == steps:
            partial_file = file.with_suffix(".part")
            partial_file.write_bytes(serialization.to_bytes(jax.device_get(state)))
            partial_file.replace(file)
            saved = time.time()
    return state["ema"]


def smoothed(logits: Any, target: Any, mass: float) -> Any:
    """Cross-entropy per row against a one-hot (or given) target, label smoothing ``mass``."""
    logp = jax.nn.log_softmax(logits)
    return -(1 - mass) * jnp.sum(logp * target, -1) - mass * jnp.mean(logp, -1) * jnp.sum(target, -1)


def spread_kernels(params: dict) -> dict:
    """Kernels rescaled from the configuration's 0.02 to fan-in ** -0.5 (half of that where a residual
    branch ends): at these widths 0.02 leaves the branches all but silent, and learning stood still for 300 steps."""

    def spread(path: tuple, leaf: Any) -> Any:
        names = [part.key for part in path]
        if names[-1] != "kernel" or names[-2] in ("conv1", "conv2"):  # depthwise: already beside a skip connection
            return leaf
        fan_in = np.prod(leaf.shape[:-1]) if names[-2] == "conv" else leaf.shape[-2]
        return leaf / 0.02 * fan_in**-0.5 * (0.5 if names[-2] in ("proj", "out_proj", "fc2") else 1.0)

    return jax.tree_util.tree_map_with_path(spread, params)


def train_vision(run: Pretrain, vlm: Any, params: dict, classes: Classes, corpus: Corpus, valid: Corpus) -> dict:
    """The tower and projector after the classification phase."""
    width = vlm.config.text_config.d_model
    heads = {
        name: {"kernel": jnp.zeros((5 * width, size)), "bias": jnp.zeros(size)} for name, size in classes.sizes.items()
    }
    tower = spread_kernels(params["vision_tower"])
    eyes = {"vision_tower": tower, "image_projector": params["image_projector"], "heads": heads}

    see = with_cheap_gradient(vlm.image_features)

    def scores(eyes: Any, pixels: Any) -> tuple[dict, Any]:
        """Every head's logits; and how far the pooled features repeat each other, which is 0 at best."""
        tokens = see({k: v for k, v in eyes.items() if k != "heads"}, None, pixels)
        corners = tokens[:, 1:].reshape(-1, 2, 2, 2, 2, width).mean((2, 4)).reshape(-1, 4 * width)
        pooled = jnp.concatenate([tokens[:, 0], corners], -1)
        # Standardised over the batch: what all pictures share would swamp Adam's step sizes, and nothing is learned.
        pooled = (pooled - pooled.mean(0)) * jax.lax.rsqrt(pooled.var(0) + 1e-4)
        mean = pooled[:, :width]
        repeated = jnp.sum((mean.T @ mean / len(mean) * (1 - jnp.eye(width))) ** 2) / width
        heads = eyes["heads"].items()
        return {name: HEAD_SPEED * (pooled @ head["kernel"] + head["bias"]) for name, head in heads}, repeated

    def loss(eyes: Any, pixels: Any, rows: Any, partner: Any, weight: Any) -> tuple[Any, dict]:
        logits, repeated = scores(eyes, pixels)
        total, metrics = REPEATED_WEIGHT * repeated, {"repeated": repeated}
        for name, size in classes.sizes.items():
            target = rows[name] if name == "tags" else jax.nn.one_hot(rows[name], size)
            mixed = weight * target + (1 - weight) * target[partner]
            metrics[f"loss_{name}"] = value = smoothed(logits[name], mixed, 0.05).mean()
            total += HEAD_WEIGHTS[name] * value
        right = jnp.argmax(logits["subgroup"], -1) == rows["subgroup"]
        return total, metrics | {"train_subgroup": right.mean(dtype=jnp.float32)}

    count = len(corpus.pixels)

    def batches(rng: np.random.Generator, number: int) -> tuple:
        per_epoch = count // run.vision_batch
        order = np.random.default_rng([run.seed, 7, number // per_epoch]).permutation(count)
        chosen = order[number % per_epoch * run.vision_batch :][: run.vision_batch]
        images = nano_augment.blend_styles(rng, corpus.pixels, chosen, corpus.peers)
        ramp = min(1.0, 2 * number / run.vision_steps)  # gently at first: under full augmentation nothing is learned
        images = nano_augment.augment(rng, images, run.strength * (0.2 + 0.8 * ramp))
        images, partner, weight = nano_augment.mix_pairs(rng, images, 0.25 * ramp)
        rows = {name: getattr(corpus, name)[chosen] for name in classes.sizes}
        return images, rows, partner, np.float32(weight)

    scores_jit = jax.jit(scores)

    def evaluate(eyes: Any) -> dict:
        pixels = nano_augment.normalize(valid.pixels)
        logits = [jax.device_get(scores_jit(eyes, pixels[i : i + 102])[0]) for i in range(0, len(pixels), 102)]
        return {
            f"valid_{name}": float(np.mean(np.concatenate([part[name] for part in logits]).argmax(-1) == truth))
            for name, truth in (("group", valid.group), ("subgroup", valid.subgroup))
        }

    eyes = train(run, "vision", eyes, run.vision_steps, run.vision_rate, loss, batches, evaluate)
    return {**params, "vision_tower": eyes["vision_tower"], "image_projector": eyes["image_projector"]}


def centre_tokens(vlm: Any, params: dict, corpus: Corpus) -> dict:
    """The projector's last norm rescaled so that image tokens have mean 0 and deviation 1 over the training pictures:
    what all pictures share would slow the text half down as it slowed the heads."""
    extract = jax.jit(partial(vlm.image_features, params, None))
    starts = range(0, len(corpus.pixels) - 99, 100)
    tokens = np.concatenate([extract(nano_augment.normalize(corpus.pixels[i : i + 100])) for i in starts])
    mean, deviation = tokens.mean((0, 1)), tokens.std((0, 1))
    norm = params["image_projector"]["image_proj_norm"]
    centred = {"scale": norm["scale"] / deviation, "bias": (norm["bias"] - mean) / deviation}
    return {**params, "image_projector": {**params["image_projector"], "image_proj_norm": centred}}


def feature_copies(run: Pretrain, vlm: Any, params: dict, corpus: Corpus, copies: int) -> np.ndarray:
    """float16 [copies, N, P, D]: features of the pictures, the first copy as they are, the others augmented."""
    file = run.work / f"features-{copies}-{len(corpus.pixels)}.npy"
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


def encode_pairs(tokenizer: Any, pairs: list[tuple[str, str]], image: int) -> dict[str, np.ndarray]:
    """Prompts [B, 17 + PROMPT_LENGTH] as the processor makes them, and labels [B, ANSWER_LENGTH], cut to fit."""
    width = nano_tokenizer.IMAGE_TOKENS + PROMPT_LENGTH
    ids = np.full((len(pairs), width), 1, np.int32)
    labels = np.full((len(pairs), ANSWER_LENGTH), IGNORED, np.int32)
    ids[:, : nano_tokenizer.IMAGE_TOKENS] = image
    for line, label, question, answer in zip(
        ids,
        labels,
        tokenizer([q for q, _ in pairs]).input_ids,
        tokenizer([a for _, a in pairs]).input_ids,
        strict=True,
    ):
        line[nano_tokenizer.IMAGE_TOKENS :][: len(question)] = question[:PROMPT_LENGTH]
        label[: len(answer)] = answer[:ANSWER_LENGTH]
    return {"input_ids": ids, "attention_mask": (ids != 1).astype(np.int32), "labels": labels}


def train_text(run: Pretrain, vlm: Any, params: dict, tokenizer: Any, corpus: Corpus, valid: Corpus) -> dict:
    """The text half after learning to answer on the frozen features."""
    features = feature_copies(run, vlm, params, corpus, run.copies)
    unseen = feature_copies(run, vlm, params, valid, 1)[0]
    image = vlm.config.image_token_id

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
        batch = encode_pairs(tokenizer, [draw_pair(rng, corpus.names[row]) for row in rows], image)
        seen = features[rng.integers(0, run.copies, run.text_batch), rows].astype(np.float32)
        seen += rng.normal(0, 0.15, seen.shape).astype(np.float32)
        seen *= rng.random((*seen.shape[:2], 1)) > 0.1  # whole image tokens dropped
        return ({**batch, "image_features": seen},)

    rng = np.random.default_rng(run.seed)
    rows = np.arange(len(valid.names))
    pairs = [(NEUTRAL_QUESTIONS["subgroup"], valid.names[row]["en"]["subgroup"]) for row in rows]
    pairs += [(q[1], valid.names[row][language]["subgroup"]) for row in rows for language, q in [_draw_language(rng)]]
    check = encode_pairs(tokenizer, pairs, image) | {"image_features": np.concatenate([unseen, unseen])}
    forced = jax.jit(lambda text, batch: loss(text, batch)[1]["train_exact"])

    def evaluate(text: Any) -> dict:
        """Teacher-forced exact match of subgroups, a quick stand-in for generation."""
        halves = [{key: value[part] for key, value in check.items()} for part in np.split(np.arange(len(pairs)), 2)]
        return {
            f"valid_{name}": float(forced(text, half)) for name, half in zip(("neutral", "own"), halves, strict=True)
        }

    start = spread_kernels(params["language_model"])
    text = train(run, "text", start, run.text_steps, run.text_rate, loss, batches, evaluate)
    return {**params, "language_model": text}


def _draw_language(rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    language = str(rng.choice(list(CLIENT_QUESTIONS)))
    return language, CLIENT_QUESTIONS[language]


def main(run: Pretrain) -> None:
    keep_heap()
    run.work.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((run.work / "xla").resolve()))
    classes, corpus, valid = load_corpus(run.corpus)
    if not (run.folder / "tokenizer.json").is_file():
        rows = pq.read_table(run.corpus, columns=["split", "concept", "names"]).to_pylist()
        questions = [*NEUTRAL_QUESTIONS.values(), *(q for asked in CLIENT_QUESTIONS.values() for q in asked)]
        nano_tokenizer.write_folder(
            run.folder, nano_tokenizer.train_tokenizer(nano_tokenizer.corpus_texts(rows, questions))
        )
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    config = nano_tokenizer.make_config(len(tokenizer))
    vlm = build(config, generation_config=nano_tokenizer.make_generation_config())
    params = jax.jit(vlm.init)(jax.random.key(run.seed))
    log(run, phase="start", train=len(corpus.names), valid=len(valid.names), **classes.sizes)
    params = train_vision(run, vlm, params, classes, corpus, valid)
    params = centre_tokens(vlm, params, corpus)
    params = train_text(run, vlm, params, tokenizer, corpus, valid)
    save_checkpoint(vlm, params, run.folder, np.float16)
    log(run, phase="saved")


if __name__ == "__main__":
    main(tyro.cli(Pretrain))
