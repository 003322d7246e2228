"""Rows as the model reads them: tokens, and either the image's frozen features or its pixels.

Unless the adapter reaches into the vision tower or the projector, a row's image is its features, from a `FeatureStore`.
Otherwise pixels are decoded for the rows that are asked for.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

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
        batch, views = _read_text(examples, rows), examples.view[rows]
        if store is not None:
            features = store.gather(examples.views, views, _count_tokens(examples, store))
            return batch | _arrange(examples, store, views, features)
        views = _drop_one(views)
        distinct, which = np.unique(views, return_inverse=True)
        blank, shown = distinct[distinct < 0], distinct[distinct >= 0]
        pixels = examples.views.render(shown, processor.pixels, WORKERS)
        if len(blank):
            pixels = np.concatenate([np.zeros_like(pixels[:1]), pixels])
        return batch | {"pixel_values": pixels[which.reshape(views.shape)]}

    return read


def make_blank_inputs(examples: "Examples", processor: Processor, store: FeatureStore | None) -> Inputs:
    """As `make_inputs`, of the same shapes and at once, for all pictures are blank: what compiling a round takes."""

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch, views = _read_text(examples, rows), examples.view[rows]
        if store is not None:
            shape = (*rows.shape, _count_tokens(examples, store), store.width)
            return batch | _arrange(examples, store, views, np.zeros(shape, store.dtype))
        shape = (*_drop_one(views).shape, *processor.size, 3)
        return batch | {"pixel_values": np.zeros(shape, np.float32)}

    return read


def add_questions(inputs: Inputs, questions: Int[np.ndarray, " rows"]) -> Inputs:
    """Put the number of a row's question, as rewards of a file go by it, beside what is in every batch."""
    return lambda rows: inputs(rows) | {"reward_question": questions[rows]}


def _count_tokens(examples: "Examples", store: FeatureStore) -> int:
    """Count the image tokens that every row has room for."""
    return examples.view.shape[1] * store.each if store.each else examples.image_tokens or 0


def _arrange(
    examples: "Examples", store: FeatureStore, views: np.ndarray, features: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrange rows of features as a batch has them: by view where all have one size, and else with their grids."""
    if examples.views.grids is not None:
        return {"image_features": features, "image_grids": examples.views.find_grids(views)}
    if store.each and views.shape[-1] > 1:
        features = features.reshape(*views.shape, store.each, store.width)
    return {"image_features": features}


def _drop_one(views: np.ndarray) -> np.ndarray:
    """Leave out the last axis where every row has one view."""
    return views[..., 0] if views.shape[-1] == 1 else views


def _read_text(examples: "Examples", rows: np.ndarray) -> dict[str, np.ndarray]:
    text = {"input_ids": examples.input_ids, "attention_mask": examples.attention_mask, "labels": examples.labels}
    if examples.rejected is not None:
        text["rejected_labels"] = examples.rejected
    return {name: array[rows] for name, array in text.items()}
