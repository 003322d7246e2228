"""What the model reads of a row: tokens, and either the image's frozen features or its pixels.

Unless the adapter reaches into the vision tower or the projector, a row's image is its features, from a `FeatureStore`.
Otherwise pixels are decoded for the rows that are asked for.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.models import Processor

Inputs = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(rows [...]) -> the batch of these rows, arrays [..., …]; may be called from several threads."""

WORKERS = 4
"""Threads that decode pictures: the decoders release the interpreter."""


def make_inputs(examples: Examples, processor: Processor, store: FeatureStore | None) -> Inputs:
    """Build the function from rows to batches.

    Args:
        examples: all rows of the federation.
        processor: of the model.
        store: where frozen features are; None where the adapter reaches into the vision tower, or where nothing is to
            be kept, so that pixels are read.
    """
    text = _find_text(examples)

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = {name: array[rows] for name, array in text.items()}
        image = examples.image[rows]
        if store is not None:
            batch["image_features"] = store.gather(examples.images, image)
        else:
            batch["pixel_values"] = _read_pixels(examples, processor, image)
        return batch

    return read


def make_blank_inputs(examples: Examples, processor: Processor, store: FeatureStore | None) -> Inputs:
    """As `make_inputs`, of the same shapes and at once, for all pictures are blank: what compiling a round takes."""
    text = _find_text(examples)
    name = "pixel_values" if store is None else "image_features"
    shape, dtype = ((*processor.size, 3), np.dtype(np.float32)) if store is None else (store.shape, store.dtype)

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[rows] for name, array in text.items()} | {name: np.zeros((*rows.shape, *shape), dtype)}

    return read


def _find_text(examples: Examples) -> dict[str, np.ndarray]:
    text = {"input_ids": examples.input_ids, "attention_mask": examples.attention_mask, "labels": examples.labels}
    return text if examples.rejected is None else text | {"rejected_labels": examples.rejected}


def _read_pixels(examples: Examples, processor: Processor, image: np.ndarray) -> np.ndarray:
    distinct, which = np.unique(image, return_inverse=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        pictures = list(pool.map(examples.images.decode, distinct.tolist()))
    return processor.pixels(pictures)[which.reshape(image.shape)]
