"""Texts made token arrays by a processor, some at a time, and arrays of different widths laid together."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedvlm_jax.data.batches import MULTIPLE

UNRELATED = (KeyboardInterrupt, SystemExit, MemoryError)  # exceptions of a processor that no text is to blame for


def ask_processor(ask: Callable[[list[Any]], Any], texts: Sequence[Any], what: str) -> tuple[Any, dict[int, str]]:
    """Have a processor tokenise texts, those that it refuses as empty ones; also return place -> reason for these.

    Whatever it raises is a text's fault; `what` names the texts in a reason.
    """
    try:
        return ask([*texts]), {}
    except UNRELATED:
        raise
    except BaseException:  # what ends a tokenizer written in Rust is no Exception
        refused = dict[int, str]()
    for place, text in enumerate(texts):
        try:
            ask([text])
        except UNRELATED:
            raise
        except BaseException as error:
            refused[place] = f"{what} refused: {error}"[:120]
    return ask(["" if place in refused else text for place, text in enumerate(texts)]), refused


def list_unfit(unfit: dict[int, str], which: np.ndarray) -> dict[int, str]:
    """Turn places among distinct texts into those of the rows [N] that have them."""
    return {row: unfit[place] for row, place in enumerate(which.tolist()) if place in unfit}


def take(array: np.ndarray, kept: np.ndarray, counted: np.ndarray, fill: int) -> np.ndarray:
    """Take rows, as wide as the one with most tokens that count, rounded up.

    >>> tokens = np.asarray([[5, 6], [7, 0]])
    >>> take(tokens, np.asarray([1, 0]), tokens > 0, 0).tolist()
    [[7, 0, 0, 0], [5, 6, 0, 0]]
    """
    width = -(-max(1, int(counted.sum(axis=1)[kept].max(initial=0))) // MULTIPLE) * MULTIPLE
    return widen(array, width, fill)[kept, :width]


def stack(parts: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Lay arrays [n, T] of different widths T below each other."""
    width = max((part.shape[1] for part in parts), default=0)
    return np.concatenate([np.empty((0, width), np.int32), *(widen(part, width, fill) for part in parts)])


def widen(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    """Fill up rows [n, T] on the right to a width."""
    missing = max(0, width - array.shape[1])
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill)
