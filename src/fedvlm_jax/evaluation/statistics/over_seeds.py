"""Statistics over seeds: means, spreads and paired comparisons of scores by seed and client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedvlm_jax.evaluation.statistics.confidence_intervals import Difference, paired_difference

BySeed = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Spread:
    """Mean of a number per seed, and its sample standard deviation where there are two seeds or more."""

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
    means = {
        method: np.mean([np.mean(list(of_seed.values())) for of_seed in scores[method].values()]) for method in methods
    }
    return sorted(methods, key=lambda method: -float(means[method]))


def keep_common(method: BySeed, other: BySeed) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Cut both down to the seeds, and to the clients of all these seeds, that both have."""
    seeds = sorted(method.keys() & other.keys())
    clients = set.intersection(*(set(side[seed]) for side in (method, other) for seed in seeds)) if seeds else set()
    cut = [
        {seed: {client: side[seed][client] for client in sorted(clients)} for seed in seeds if clients}
        for side in (method, other)
    ]
    return cut[0], cut[1]


def compare_paired(method: BySeed, other: BySeed) -> Difference | None:
    """Compare two methods on the seeds and clients that both have; `None` where there are none."""
    ours, theirs = keep_common(method, other)
    return paired_difference(ours, theirs) if ours else None


def count_seeds_ahead(method: BySeed, other: BySeed) -> int:
    """Count the seeds in which the mean over clients is higher than the other method's."""
    ours, theirs = keep_common(method, other)
    return sum(bool(np.mean(list(ours[seed].values())) > np.mean(list(theirs[seed].values()))) for seed in ours)


def judge(difference: Difference) -> str:
    """Say "ahead" or "behind" where the 95 % interval leaves zero out, else "level" (also where there is none)."""
    return "ahead" if difference.low > 0 else "behind" if difference.high < 0 else "level"
