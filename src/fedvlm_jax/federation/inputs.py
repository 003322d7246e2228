"""What the model reads of a row: tokens, and either the image's frozen features or its pixels.

Unless the adapter reaches into the vision tower or the projector, a row's image is its features, from a `FeatureStore`.
Otherwise pixels are decoded for the rows that are asked for.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedvlm_jax.data.encode import Examples
from fedvlm_jax.federation.features import FeatureStore, PixelReader

__all__ = ["Inputs", "make_inputs"]

Inputs = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(rows [...]) -> the batch of these rows, arrays [..., …]; may be called from several threads."""

WORKERS = 4
"""Threads that decode pictures: the decoders release the interpreter."""


def make_inputs(examples: Examples, processor: PixelReader, store: FeatureStore | None) -> Inputs:
    """Build the function from rows to batches.

    Args:
        examples: all rows of the federation.
        processor: of the model.
        store: where frozen features are; None where the adapter reaches into the vision tower, or where nothing is to
            be kept, so that pixels are read.
    """
    text = {
        "input_ids": examples.input_ids,
        "attention_mask": examples.attention_mask,
        "labels": examples.labels,
    }
    if examples.rejected is not None:
        text["rejected_labels"] = examples.rejected

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = {name: array[rows] for name, array in text.items()}
        image = examples.image[rows]
        if store is not None:
            batch["image_features"] = store.gather(examples.images, image)
        else:
            batch["pixel_values"] = _read_pixels(examples, processor, image)
        return batch

    return read


def _read_pixels(examples: Examples, processor: PixelReader, image: np.ndarray) -> np.ndarray:
    distinct, which = np.unique(image, return_inverse=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        pictures = list(pool.map(examples.images.decode, distinct.tolist()))
    return processor.pixels(pictures)[which.reshape(image.shape)]
