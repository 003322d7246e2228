"""Statistics over seeds: means, spreads and paired comparisons of scores by seed and client."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedvlm_jax.errors import UserError

BySeed = Mapping[int, Mapping[str, float]]
"""seed -> client -> score."""


@dataclass(frozen=True)
class Spread:
    """Mean of a number per seed, and its sample standard deviation, None with one seed."""

    mean: float
    std: float | None
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Summarise a number per seed.

    >>> spread([0.5, 0.7])
    Spread(mean=0.6, std=0.14142135623730948, seeds=2)
    """
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def mean_over_seeds(by_seed: BySeed) -> dict[str, float]:
    """Average each client's score over the seeds in which it has one.

    >>> mean_over_seeds({0: {"ann": 0.5, "bob": 1.0}, 1: {"ann": 0.7}})
    {'ann': 0.6, 'bob': 1.0}
    """
    clients = sorted({client for scores in by_seed.values() for client in scores})
    return {
        client: float(np.mean([scores[client] for scores in by_seed.values() if client in scores]))
        for client in clients
    }


def order_by_mean(scores: Mapping[str, BySeed], methods: Sequence[str]) -> list[str]:
    """Order methods by their mean over clients within a seed, then over seeds, the highest first; ties keep order."""

    def mean(method: str) -> float:
        return float(np.mean([np.mean(list(of_seed.values())) for of_seed in scores[method].values()]))

    return sorted(methods, key=mean, reverse=True)


def keep_common(method: BySeed, other: BySeed) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Cut both down to the seeds, and to the clients of all these seeds, that both have.

    >>> keep_common({0: {"ann": 0.5, "bob": 1.0}, 1: {"ann": 0.7}}, {0: {"ann": 0.4}})
    ({0: {'ann': 0.5}}, {0: {'ann': 0.4}})
    """
    seeds = sorted(method.keys() & other.keys())
    clients = set.intersection(*(set(side[seed]) for side in (method, other) for seed in seeds)) if seeds else set()
    cut = [
        {seed: {client: side[seed][client] for client in sorted(clients)} for seed in seeds if clients}
        for side in (method, other)
    ]
    return cut[0], cut[1]


@dataclass(frozen=True)
class Difference:
    """The difference of two methods a and b on the same clients and seeds."""

    mean: float  # a minus b, averaged over clients within a seed, then over seeds
    standard_error: float  # of that mean, from the spread between seeds; NaN with a single value
    low: float  # 95 % confidence interval, Student's t; NaN with a single value
    high: float
    wins: float  # share of (seed, client) pairs in which a is better, ties counting half
    seeds: int
    clients: int  # in each of the seeds
    over: str  # the population of the interval: "seeds", or "clients" where there is a single seed


def paired_difference(a: BySeed, b: BySeed) -> Difference:
    """Compare two methods over seeds and clients, pair by pair, with a 95 % interval.

    The unit is the seed: clients of a seed share a training run, so their differences are averaged first, and Student's
    t over the seed means (n - 1 degrees of freedom) gives the interval, for new seeds of such a population of clients.
    With one seed the unit is the client; such an interval says nothing about other seeds, and is too narrow where
    clients share parameters. No bootstrap: five seeds are too few to resample.

    Raises:
        UserError: no seeds, or seeds or clients that are not the same in both.

    >>> plora, fedavg = {0: {"ann": 0.7, "bob": 0.5}, 1: {"ann": 0.6, "bob": 0.8}}, {0: {"ann": 0.5, "bob": 0.4}}
    >>> fedavg[1] = {"ann": 0.5, "bob": 0.6}
    >>> difference = paired_difference(plora, fedavg)
    >>> round(difference.mean, 3), difference.wins, difference.over
    (0.15, 1.0, 'seeds')
    """
    if not a or a.keys() != b.keys():
        raise UserError(f"a comparison needs the same seeds on both sides; got {sorted(a)} and {sorted(b)}.")
    clients = sorted(next(iter(a.values())))
    for seed in a:
        if not clients or sorted(a[seed]) != clients or sorted(b[seed]) != clients:
            raise UserError(
                f"a comparison needs the same clients on both sides and in every seed; seed {seed} differs."
            )
    pairs = np.asarray([[a[seed][client] - b[seed][client] for client in clients] for seed in sorted(a)], np.float64)
    units = pairs.mean(axis=1) if len(pairs) > 1 else pairs[0]  # seeds, or the clients of the only one
    mean = float(pairs.mean())
    error, reach = _find_reach(units)
    return Difference(
        mean=mean,
        standard_error=error,
        low=mean - reach,
        high=mean + reach,
        wins=float(((pairs > 0) + 0.5 * (pairs == 0)).mean()),
        seeds=len(pairs),
        clients=len(clients),
        over="seeds" if len(pairs) > 1 else "clients",
    )


def _find_reach(units: np.ndarray) -> tuple[float, float]:
    """Return the standard error of the mean of n values, and how far its 95 % t-interval reaches; NaN for one."""
    if len(units) < 2:
        return math.nan, math.nan
    from scipy.stats import t  # late: it takes a second to import

    error = float(units.std(ddof=1) / np.sqrt(len(units)))
    return error, error * float(t.ppf((1 + 0.95) / 2, len(units) - 1))


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, over clients that may be others in every seed."""

    mean: float  # over clients within a seed, then over seeds
    low: float  # 95 % confidence interval, Student's t; NaN with a single value
    high: float
    over: str  # the population of the interval: "seeds", or "clients" where there is a single seed


def estimate_mean(by_seed: BySeed) -> Estimate:
    """Estimate a mean over new seeds; each has clients of its own. With one seed the interval is over its clients.

    Raises:
        UserError: no seeds, or one without clients.

    >>> estimate = estimate_mean({0: {"ann": 0.4, "bob": 0.6}, 1: {"cyd": 0.7}})
    >>> round(estimate.mean, 3), round(estimate.high, 3), estimate.over
    (0.6, 1.871, 'seeds')
    """
    if not by_seed or not all(by_seed.values()):
        raise UserError("there is nothing to average; expected the score of at least one client in every seed.")
    means = np.asarray([np.mean(list(scores.values())) for _, scores in sorted(by_seed.items())])
    units = means if len(means) > 1 else np.asarray(list(next(iter(by_seed.values())).values()), np.float64)
    mean, reach = float(means.mean()), _find_reach(units)[1]
    return Estimate(mean, mean - reach, mean + reach, "seeds" if len(means) > 1 else "clients")


def subtract_scores(method: BySeed, other: BySeed) -> dict[int, dict[str, float]]:
    """Subtract the other method's scores, in the seeds and of the clients that both have.

    >>> subtract_scores({0: {"ann": 0.75, "bob": 1.0}}, {0: {"ann": 0.5}, 1: {"ann": 0.7}})
    {0: {'ann': 0.25}}
    """
    both = {
        seed: {client: score - other[seed][client] for client, score in method[seed].items() if client in other[seed]}
        for seed in sorted(method.keys() & other.keys())
    }
    return {seed: scores for seed, scores in both.items() if scores}


def compare_paired(method: BySeed, other: BySeed) -> Difference | None:
    """Compare two methods on the seeds and clients that both have; `None` where there are none."""
    ours, theirs = keep_common(method, other)
    return paired_difference(ours, theirs) if ours else None


def count_seeds_ahead(method: BySeed, other: BySeed) -> int:
    """Count the seeds in which the mean over clients is higher than the other method's."""
    ours, theirs = keep_common(method, other)
    return sum(bool(np.mean(list(ours[seed].values())) > np.mean(list(theirs[seed].values()))) for seed in ours)


def judge(difference: Difference | Estimate) -> str:
    """Say "ahead" or "behind" where the 95 % interval leaves zero out, else "level" (also where there is none)."""
    if difference.low > 0:
        return "ahead"
    return "behind" if difference.high < 0 else "level"
