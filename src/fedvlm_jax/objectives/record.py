"""The record that a training objective is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

__all__ = ["Objective"]

Metrics = dict[str, Array]


class Objective(NamedTuple):
    """What local training minimises.

    Attributes:
        name: as the command line knows it.
        source: where it comes from.
        loss: (vlm, params, adapter, batch) -> (scalar, metrics of scalars). `batch` is the model's (see `models.vlm`);
            examples that do not count have all their labels at -100. Pure; a batch in which nothing counts has loss 0.
    """

    name: str
    source: str
    loss: Callable[[Any, Any, Any, Mapping[str, Array]], tuple[Float[Array, ""], Metrics]]
