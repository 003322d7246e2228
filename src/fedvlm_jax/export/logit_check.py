"""The distance of the logits of what was written, read back, from those of the run's own model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.models import Batch, Params, Vlm


class LogitError(NamedTuple):
    """The largest difference of a logit, and the largest logit."""

    error: float
    largest: float

    def __str__(self) -> str:
        return f"{self.error:.1e} of logits up to {self.largest:.3g}"


def make_batch(vlm: Vlm) -> dict[str, np.ndarray]:
    """Make a small batch of noise on which every part of a model runs: a picture, its tokens, and an answer.

    >>> from fedvlm_jax.models import read_vlm
    >>> sorted(make_batch(read_vlm("florence2-nano")))
    ['attention_mask', 'input_ids', 'labels', 'pixel_values']
    """
    random, shapes = np.random.default_rng(0), vlm.example_batch()
    count = vlm.image_tokens(*shapes["pixel_values"].shape[1:3])
    length, labels = max(shapes["input_ids"].shape[1], count) + 6, 4 if not vlm.classes and vlm.bind is None else 1
    ids = random.integers(0, vlm.vocabulary, (1, length))
    ids[ids == vlm.image_token_id] = vlm.image_token_id - 1 if vlm.image_token_id else 1
    ids[:, :count] = vlm.image_token_id
    return {
        "pixel_values": random.standard_normal(shapes["pixel_values"].shape).astype(np.float32),
        "input_ids": ids.astype(np.int32),
        "attention_mask": np.ones((1, length), np.int32),
        "labels": random.integers(0, vlm.vocabulary, (1, labels)).astype(np.int32),
    }


def make_check(vlm: Vlm) -> Callable[[Params, PyTree, Params, PyTree], LogitError]:
    """Make the function that compares a base and adapter with another base and adapter; either may have no adapter."""
    batch: Batch = make_batch(vlm)
    logits = jax.jit(lambda params, adapter: vlm.logits(params, adapter, batch))

    def check(params: Params, adapter: PyTree, other_params: Params, other_adapter: PyTree) -> LogitError:
        wanted, found = np.asarray(logits(params, adapter)), np.asarray(logits(other_params, other_adapter))
        return LogitError(float(np.abs(found - wanted).max()), float(np.abs(wanted).max()))

    return check
