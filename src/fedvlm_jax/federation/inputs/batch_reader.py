"""Rows as the model reads them: tokens, and either the image's frozen features or its pixels.

Unless the adapter reaches into the vision tower or the projector, a row's image is its features, from a `FeatureStore`.
Otherwise pixels are decoded for the rows that are asked for.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.models import Processor

if TYPE_CHECKING:
    from fedvlm_jax.data.tokenization import Examples  # which loads pyarrow

Inputs = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(rows [...]) -> the batch of these rows, arrays [..., …]; may be called from several threads."""

WORKERS = 4  # threads that decode pictures: the decoders release the interpreter


def make_inputs(examples: "Examples", processor: Processor, store: FeatureStore | None) -> Inputs:
    """Make the function from rows, of all of the federation, to batches.

    Frozen features are in the store; None where the adapter reaches into the vision tower, or where nothing is to be
    kept, so that pixels are read.
    """

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch, views = _read_text(examples, rows), _drop_one(examples.view[rows])
        if store is not None:
            return batch | {"image_features": store.gather(examples.views, views)}
        distinct, which = np.unique(views, return_inverse=True)
        blank, shown = distinct[distinct < 0], distinct[distinct >= 0]
        pixels = examples.views.render(shown, processor.pixels, WORKERS)
        if len(blank):
            pixels = np.concatenate([np.zeros_like(pixels[:1]), pixels])
        return batch | {"pixel_values": pixels[which.reshape(views.shape)]}

    return read


def make_blank_inputs(examples: "Examples", processor: Processor, store: FeatureStore | None) -> Inputs:
    """As `make_inputs`, of the same shapes and at once, for all pictures are blank: what compiling a round takes."""
    name = "pixel_values" if store is None else "image_features"
    shape, dtype = ((*processor.size, 3), np.dtype(np.float32)) if store is None else (store.shape, store.dtype)
    if (most := examples.view.shape[1]) > 1:
        shape = (most, *shape)
    return lambda rows: _read_text(examples, rows) | {name: np.zeros((*rows.shape, *shape), dtype)}


def _drop_one(views: np.ndarray) -> np.ndarray:
    """Leave out the last axis where every row has one view."""
    return views[..., 0] if views.shape[-1] == 1 else views


def _read_text(examples: "Examples", rows: np.ndarray) -> dict[str, np.ndarray]:
    text = {"input_ids": examples.input_ids, "attention_mask": examples.attention_mask, "labels": examples.labels}
    if examples.rejected is not None:
        text["rejected_labels"] = examples.rejected
    return {name: array[rows] for name, array in text.items()}
