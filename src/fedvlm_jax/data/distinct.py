"""Distinct values in the order in which they are met."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

import numpy as np
from jaxtyping import Int

T = TypeVar("T", bound=Hashable)


def number_distinct(values: Iterable[T | None]) -> tuple[list[T], Int[np.ndarray, " values"]]:
    """List distinct values, and number all of them [N] by their places in that list; None is -1.

    >>> distinct, numbers = number_distinct(["cat", None, "dog", "cat"])
    >>> distinct, numbers.tolist()
    (['cat', 'dog'], [0, -1, 1, 0])
    """
    places: dict[T, int] = {}
    numbers = [-1 if value is None else places.setdefault(value, len(places)) for value in values]
    return list(places), np.asarray(numbers, np.int64)
