"""Statistics over clients: mean, spread, resampled intervals, fairness, gains, and the cross-client matrix."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedvlm_jax.errors import UserError, format_count

LEVEL = 0.95  # of the bootstrap's interval
RESAMPLES = 2000  # from one random seed to another the ends of a 95 % interval move by about 2 % of its width
DRAWS = 1 << 20  # clients drawn at a time: a bound on memory


@dataclass(frozen=True)
class Summary:
    """Mean and spread of a metric over clients, all of which count the same."""

    mean: float
    std: float  # population standard deviation: divided by the number of clients
    worst_decile: float  # mean of the lowest ceil(10 %) of the clients: of 16 clients the lowest 2
    min: float
    max: float
    clients: int
    jain: float  # Jain's fairness index; NaN where a value is negative or all are zero


def summarise(values: Mapping[str, float]) -> Summary:
    """Summarise a metric over clients, client -> value; those without a value (no test examples) do not belong there.

    Raises:
        UserError: no clients, or a value that is not finite.

    >>> summary = summarise({"ann": 0.2, "bob": 0.6, "cyd": 0.7})
    >>> round(summary.mean, 3), summary.worst_decile, round(summary.jain, 3)
    (0.5, 0.2, 0.843)
    """
    if not values:
        raise UserError("there is no client to summarise; expected a value for at least one.")
    odd = [client for client, value in values.items() if not math.isfinite(value)]
    if odd:
        raise UserError(
            f"the values of {len(odd)} of {format_count(len(values), 'client')} are not finite "
            f"({', '.join(odd[:5])}); leave clients "
            "without examples out, and look at the losses of the others."
        )
    numbers = np.asarray(list(values.values()), np.float64)
    # Products with shares, not `mean`, whose last bits differ: stored results were computed so.
    shares = np.full(len(numbers), 1 / len(numbers))
    mean = float(shares @ numbers)
    return Summary(
        mean=mean,
        std=float(np.sqrt(shares @ (numbers - mean) ** 2)),
        worst_decile=float(np.sort(numbers)[: math.ceil(len(numbers) / 10)].mean()),
        min=float(numbers.min()),
        max=float(numbers.max()),
        clients=len(numbers),
        jain=jain_index(numbers),
    )


def bootstrap_interval(values: Mapping[str, float]) -> tuple[float, float]:
    """Bootstrap a mean by percentiles (Efron 1979); the 95 % interval's ends, NaN with a single value.

    For many values, as a client's test examples are: percentiles stay within a metric's bounds, but are too narrow for
    few, by about sqrt((n - 1) / n). Over clients and seeds there are `estimate_mean` and `paired_difference`. The order
    of names makes no difference.

    Raises:
        UserError: there is no client, or a value is not finite.

    >>> [round(end, 3) for end in bootstrap_interval({"ann": 0.4, "bob": 0.6, "cyd": 0.8})]
    [0.4, 0.8]
    """
    if not values:
        raise UserError("there is nothing to resample; expected the value of one client or more.")
    # Sorted, because the order of clients must not change what is drawn.
    numbers = np.asarray([values[client] for client in sorted(values)], np.float64)
    if not np.isfinite(numbers).all():
        raise UserError("the values to resample are not all finite; leave clients without examples out.")
    count = len(numbers)
    if count == 1:  # every resample is that client: an interval of no width would claim certainty
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    # Weighted by shares, not `mean`, whose last bits differ: stored results were computed so.
    shares = np.full(count, 1 / count)
    weighted, total = numbers * shares, shares.sum()
    means: list[np.ndarray] = []
    at_once = max(1, DRAWS // count)
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(count, size=(min(at_once, RESAMPLES - start), count))
        means.append(weighted[drawn].sum(axis=1) / total)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def jain_index(values: Float[np.ndarray, " clients"]) -> float:
    """Compute Jain's fairness index (arXiv cs/9809099): (sum x)^2 / (n sum x^2).

    1 where all clients get the same; k/n where k clients share evenly and the others get nothing. NaN where a value is
    negative (margins, gains), and where all are zero: a 1 would read as success.

    >>> jain_index(np.asarray([1.0, 1.0, 0.0, 0.0]))
    0.5
    """
    largest = values.max()
    if values.min() < 0 or largest == 0:
        return math.nan
    shares = values / largest  # squares of very small and very large values would leave float64
    return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum()))


def gain_by_client(values: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Compute how much higher each client's value is than with `base` (zero-shot, or its locally trained model).

    Clients that only one of them has are left out: held-out clients have no local model to be compared with.

    >>> gain_by_client({"ann": 0.75, "new": 0.9}, {"ann": 0.5})
    {'ann': 0.25}
    """
    return {client: value - base[client] for client, value in values.items() if client in base}


@dataclass(frozen=True)
class Matrix:
    """Summary of a cross-client matrix: every client's model on every client's data."""

    diagonal: float  # mean of clients' models on the data they were trained for
    off_diagonal: float  # mean of clients' models on other clients' data; NaN with one client
    beaten: tuple[str, ...]  # the clients for whom another client's model is better, not just as good
    unbeaten: float  # share of the other clients


def summarise_matrix(
    values: Float[np.ndarray, "clients clients"], names: Sequence[str], higher_is_better: bool = True
) -> Matrix:
    """Summarise a metric [model, data] of each client's model on each client's data; `names` are both axes'.

    Raises:
        UserError: no clients, a matrix that is not square over the names, or a value that is not finite.

    >>> summary = summarise_matrix(np.asarray([[0.9, 0.6], [0.4, 0.5]]), ["ann", "bob"])
    >>> summary.diagonal, summary.off_diagonal, summary.beaten, summary.unbeaten
    (0.7, 0.5, ('bob',), 0.5)
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
    best = values.max(axis=0) if higher_is_better else values.min(axis=0)
    beaten = tuple(names[place] for place in range(count) if values[place, place] != best[place])
    return Matrix(
        diagonal=float(np.diagonal(values).mean()),
        off_diagonal=float(values[~np.eye(count, dtype=bool)].mean()) if count > 1 else math.nan,
        beaten=beaten,
        unbeaten=1 - len(beaten) / count,
    )
