"""The cross-client matrix: every client's model on every client's data, and its summary.

Axes: C clients, by model down and by data across.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedvlm_jax.errors import UserError


@dataclass(frozen=True)
class Rival:
    """A client that would do better with another client's model.

    Attributes:
        client: the client of the data.
        model: the client whose model is best on them, the first by the matrix's order where several are.
        own: the value of the client's model.
        best: the value of that other model.
    """

    client: str
    model: str
    own: float
    best: float


@dataclass(frozen=True)
class Matrix:
    """Summary of a cross-client matrix.

    Attributes:
        own: mean of the diagonal: clients' models on their own data.
        others: mean off the diagonal: clients' models on other clients' data; NaN with one client.
        own_best: share of clients for whom no other client's model is better; a tie is the owner's.
        rivals: the other clients, in the matrix's order.
        clients: number of clients.
    """

    own: float
    others: float
    own_best: float
    rivals: tuple[Rival, ...]
    clients: int


def summarise_matrix(
    values: Float[np.ndarray, "clients clients"], names: Sequence[str], higher_is_better: bool = True
) -> Matrix:
    """Summarise a cross-client matrix of one metric.

    Args:
        values: [model, data], the metric of each client's model on each client's data.
        names: of the clients, in the order of both axes.
        higher_is_better: False for a loss or a perplexity.

    Raises:
        UserError: no clients, a matrix that is not square over the names, or a value that is not finite.

    >>> summary = summarise_matrix(np.asarray([[0.9, 0.6], [0.4, 0.5]]), ["ann", "bob"])
    >>> summary.own, summary.others, summary.own_best, summary.rivals[0].client
    (0.7, 0.5, 0.5, 'bob')
    """
    values, count = np.asarray(values, np.float64), len(names)
    if not count or values.shape != (count, count):
        raise UserError(f"a matrix of shape {values.shape} for {count} clients; expected a model and data of each.")
    if not np.isfinite(values).all():
        model, data = np.argwhere(~np.isfinite(values))[0]
        raise UserError(
            f"the model of {names[model]} has no finite value on the data of {names[data]}; leave clients without "
            "examples out, and look at the losses of the others."
        )
    own = np.diagonal(values)
    best: list[int] = (values if higher_is_better else -values).argmax(axis=0).tolist()
    # By value, not by place: a tie is the owner's.
    beaten = [place for place in range(count) if values[best[place], place] != own[place]]
    return Matrix(
        own=float(own.mean()),
        others=float(values[~np.eye(count, dtype=bool)].mean()) if count > 1 else math.nan,
        own_best=1 - len(beaten) / count,
        rivals=tuple(
            Rival(names[place], names[best[place]], float(own[place]), float(values[best[place], place]))
            for place in beaten
        ),
        clients=count,
    )
