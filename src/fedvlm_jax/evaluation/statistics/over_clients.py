"""Statistics over clients: mean and spread of a metric, fairness, and each client's gain over another model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.confidence_intervals import bootstrap_mean, read_shares


@dataclass(frozen=True)
class Summary:
    """Mean and spread of a metric over clients.

    Attributes:
        mean: over clients, weighted if weights were given.
        std: population standard deviation over clients (divided by their number), with the same weights.
        worst_decile: unweighted mean of the worst ceil(10 %) of the clients: of 16 clients the worst 2.
        min, max: the extreme clients.
        clients: number of clients.
        jain: Jain's fairness index, unweighted; NaN where a value is negative or all are zero.
        low, high: 95 % bootstrap interval of the mean over clients (`bootstrap_mean`); NaN with one client. It says
            nothing about other seeds.
    """

    mean: float
    std: float
    worst_decile: float
    min: float
    max: float
    clients: int
    jain: float
    low: float
    high: float


def summarise(
    values: Mapping[str, float], weights: Mapping[str, float] | None = None, higher_is_better: bool = True
) -> Summary:
    """Summarise a metric over clients.

    Args:
        values: client -> value. A client without a value (no test examples) does not belong here.
        weights: client -> non-negative weight in mean, std and interval; without them every client counts the same.
        higher_is_better: False for a loss or a perplexity, whose worst decile is the highest tenth.

    Raises:
        UserError: no clients, a value that is not finite, or weights that are missing, negative or all zero.

    >>> summary = summarise({"ann": 0.2, "bob": 0.6, "cyd": 0.7})
    >>> round(summary.mean, 3), summary.worst_decile, round(summary.jain, 3)
    (0.5, 0.2, 0.843)
    """
    if not values:
        raise UserError("there is no client to summarise; expected a value for at least one.")
    odd = [client for client, value in values.items() if not math.isfinite(value)]
    if odd:
        raise UserError(
            f"the values of {len(odd)} of {len(values)} clients are not finite ({', '.join(odd[:5])}); leave clients "
            "without examples out, and look at the losses of the others."
        )
    numbers = np.asarray(list(values.values()), np.float64)
    shares = read_shares(values, weights)
    mean = float(shares @ numbers)
    # The worst first.
    ordered = np.sort(numbers) if higher_is_better else np.sort(numbers)[::-1]
    interval = bootstrap_mean({0: values}, weights)
    return Summary(
        mean=mean,
        std=float(np.sqrt(shares @ (numbers - mean) ** 2)),
        worst_decile=float(ordered[: math.ceil(len(numbers) / 10)].mean()),
        min=float(numbers.min()),
        max=float(numbers.max()),
        clients=len(numbers),
        jain=jain_index(numbers),
        low=interval.low,
        high=interval.high,
    )


def jain_index(values: Float[np.ndarray, " clients"]) -> float:
    """Compute Jain's fairness index (arXiv cs/9809099): (sum x)^2 / (n sum x^2).

    1 where all clients get the same; k/n where k clients share evenly and the others get nothing. NaN where a value is
    negative (margins, gains), and where all are zero: a 1 would read as success.

    >>> jain_index(np.asarray([1.0, 1.0, 0.0, 0.0]))
    0.5
    """
    numbers = np.asarray(values, np.float64)
    if (numbers < 0).any():
        return math.nan
    largest = numbers.max()
    if largest == 0:
        return math.nan
    shares = numbers / largest  # squares of very small and very large values would leave float64
    return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum()))


@dataclass(frozen=True)
class Gain:
    """Gain of clients over another model, client by client.

    Attributes:
        mean: over clients.
        low, high: 95 % bootstrap interval of the mean over clients; NaN with one client.
        min, max: the least gain (or greatest loss) and the greatest.
        better, worse: shares of clients that gain and that lose; the others do neither.
        clients: number of clients.
    """

    mean: float
    low: float
    high: float
    min: float
    max: float
    better: float
    worse: float
    clients: int


def gain_by_client(
    values: Mapping[str, float], base: Mapping[str, float], higher_is_better: bool = True
) -> dict[str, float]:
    """Compute how much better each client is than with `base` (zero-shot, or its locally trained model).

    Args:
        values, base: client -> value. Clients that only one of them has are left out: held-out clients have no local
            model to be compared with.
        higher_is_better: False for a loss or a perplexity; a gain is then a decrease.

    >>> gain_by_client({"ann": 0.75, "new": 0.9}, {"ann": 0.5})
    {'ann': 0.25}
    """
    sign = 1 if higher_is_better else -1
    return {client: sign * (value - base[client]) for client, value in values.items() if client in base}


def summarise_gain(values: Mapping[str, float], base: Mapping[str, float], higher_is_better: bool = True) -> Gain:
    """Summarise `gain_by_client` over clients.

    Raises:
        UserError: no client is in both, or a value is not finite.
    """
    gains = gain_by_client(values, base, higher_is_better)
    if not gains:
        raise UserError("a gain needs clients that both models were evaluated on; there is none.")
    summary = summarise(gains)
    numbers = np.asarray(list(gains.values()))
    return Gain(
        mean=summary.mean,
        low=summary.low,
        high=summary.high,
        min=summary.min,
        max=summary.max,
        better=float((numbers > 0).mean()),
        worse=float((numbers < 0).mean()),
        clients=summary.clients,
    )
