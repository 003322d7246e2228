"""Lengths of prompts and answers in a model's tokens, before its weights are read."""

from typing import Any

import numpy as np

from fedvlm_jax.data.classes import list_classes
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.federated_dataset import Federation, count_reasons
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import encode_usable
from fedvlm_jax.models import Processor, Vlm
from fedvlm_jax.training.federated_data import fit_lengths
from fedvlm_jax.training.loaded_model import choose_among


def describe_lengths(
    table: Table, federation: Federation, options: DataOptions, vlm: Vlm, processor: Processor
) -> dict[str, Any]:
    """Tokenise a federation as a run with this model would.

    Returns:
        Tokens of a picture or tile, the most where they differ, and how many of them the longest prompt has; image
        tokens of the prompt with most; of prompts and answers the median, the longest and the most that there may be;
        answers that are cut; rows left out -> how many.

    Raises:
        UserError: the model has no room for a prompt, or a column is missing.
    """
    if vlm.bind is not None:
        classes = list_classes(table, federation, options, pairs=False)
        _, vlm, processor = choose_among(vlm, processor, *classes, options.class_prompt)
    fitted = fit_lengths(vlm, options)
    examples = encode_usable(table, federation, processor, fitted)
    prompts, answers = examples.attention_mask.sum(axis=1), (examples.labels != -100).sum(axis=1)
    each, most = processor.image_tokens, examples.view.shape[1]
    if processor.grids is not None:
        each = int(examples.views.count_tokens(np.arange(len(examples.views))[:, None]).max(initial=0))
    return {
        "image_tokens": each,
        "most_pictures": most,
        "own_grids": processor.grids is not None,
        "most_image_tokens": most * each if examples.image_tokens is None else examples.image_tokens,
        "prompt": _measure(prompts) | {"limit": fitted.max_prompt_tokens},
        "answer": _measure(answers) | {"limit": fitted.max_answer_tokens},
        "cut": examples.truncated,
        "left_out": count_reasons(examples.skipped),
    }


def _measure(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {"median": 0.0, "p95": 0.0, "most": 0}
    return {"median": float(np.median(lengths)), "p95": float(np.percentile(lengths, 95)), "most": int(lengths.max())}
