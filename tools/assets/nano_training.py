"""What both phases of pre-training share: settings, the optimiser, and a loop that resumes where it was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pretrain:
    """Where things are and how long to train."""

    corpus: Path = ROOT / "build" / "emoji" / "public.parquet"
    model: Literal["florence2-nano", "smolvlm-nano", "clip-nano"] = "florence2-nano"
    work: Path = ROOT / "build" / "pretrain"
    """Checkpoints and log.jsonl, in a folder of the model's name."""
    assets: Path = ROOT / "src" / "fedvlm_jax" / "assets"
    """Where the model's folder is written."""
    seed: int = 0
    vision_steps: tuple[int, ...] = (1500, 3000)
    """Steps of every cosine cycle of the vision phase. A cycle added later goes on from the finished ones."""
    vision_batch: int = 32
    vision_rate: float = 4e-4
    strength: float = 0.8
    """Of the augmentation in the vision phase."""
    copies: int = 6
    """Augmented copies of every training picture whose features the text half sees."""
    text_steps: tuple[int, ...] = (1000, 1400, 1500)
    """Steps of every cosine cycle of the text phase."""
    text_batch: int = 64
    text_rate: float = 2e-3
    clip_steps: tuple[int, ...] = (300, 700)
    """Steps of every cosine cycle of CLIP-nano's phase."""
    clip_batch: int = 256
    clip_rate: float = 2e-3
    clip_copies: int = 1
    """As ``copies``, of which the first is not augmented."""
    save_seconds: float = 120.0

    @property
    def folder(self) -> Path:
        return self.assets / self.model

    @property
    def state(self) -> Path:
        return self.work / self.model


def log(run: Pretrain, **values: Any) -> None:
    line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()})
    print(line, flush=True)
    with (run.state / "log.jsonl").open("a") as file:
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
    run: Pretrain,
    phase: str,
    params: Any,
    steps: int,
    rate: float,
    loss: Any,
    batches: Any,
    evaluate: Any,
    drawn: int = 0,
) -> Any:
    """Run ``steps`` steps, resuming from the phase's checkpoint where there is one; returns the averaged weights.

    ``drawn`` is how many batches earlier cycles have drawn, so that this one draws others."""
    # A copy, because the step donates its state and `params` and `ema` start as the same arrays.
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "step": jnp.zeros((), jnp.int32)}
    state["opt"] = optimiser(rate, steps).init(params)
    file = run.state / f"{phase}.msgpack"
    if file.is_file():
        state = jax.tree.map(jnp.asarray, serialization.from_bytes(state, file.read_bytes()))
    step, saved, began = make_step(loss, rate, steps), time.time(), time.time()
    first, sums = int(state["step"]), []
    log(run, phase=phase, resumed_at=first)
    for number in range(first, steps):
        inputs = batches(np.random.default_rng([run.seed, drawn + number]), drawn + number)
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


LAST = ("proj", "out_proj", "fc2", "o_proj", "down_proj")
"""Kernels at the end of a residual branch."""


def spread_kernels(params: dict) -> dict:
    """Kernels rescaled from the configuration's 0.02 to fan-in ** -0.5 (half of that where a residual branch ends):
    at these widths 0.02 leaves the branches all but silent at first."""

    def spread(path: tuple, leaf: Any) -> Any:
        names = [part.key for part in path]
        if names[-1] != "kernel" or names[-2] in ("conv1", "conv2"):  # depthwise: already beside a skip connection
            return leaf
        fan_in = np.prod(leaf.shape[:-1]) if names[-2] in ("conv", "patch_embedding") else leaf.shape[-2]
        return leaf / 0.02 * fan_in**-0.5 * (0.5 if names[-2] in LAST else 1.0)

    return jax.tree_util.tree_map_with_path(spread, params)
