"""Confidence intervals over clients and seeds: bootstrap for one method, Student's t for a paired difference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedvlm_jax.errors import UserError

RESAMPLES = 2000  # from one random seed to another the ends of a 95 % interval move by about 2 % of its width
DRAWS = 1 << 20  # clients drawn at a time: a bound on memory


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap confidence interval.

    Attributes:
        mean: over clients within a seed, then over seeds.
        low, high: the interval; NaN where there is one client and one seed.
        over: the population: "clients", or "seeds and clients" where there are several seeds.
    """

    mean: float
    low: float
    high: float
    over: str


def bootstrap_mean(
    by_seed: Mapping[int, Mapping[str, float]],
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Bootstrap the mean over clients by percentiles (Efron 1979), nested in seeds where there are several.

    Every resample draws as many seeds as there are, with replacement, and within every drawn seed as many clients as
    it has, with replacement (Davison and Hinkley 1997, section 3.8): clients of a seed share a training run, so that
    pooling them would call 5 × 16 values 80 independent ones. With one seed it is the ordinary bootstrap over clients,
    which says nothing about other seeds. Percentiles stay within a metric's bounds, but are too narrow for few units,
    by about sqrt((n - 1) / n) for n seeds or clients: five seeds cover rather 85 than 95 %, and to compare methods over
    seeds `paired_difference` is the better tool.

    Args:
        by_seed: seed -> client -> value; one run is `{seed: values}`.
        weights: client -> non-negative weight; without them every client counts the same.
        level: the interval's coverage.
        seed: of the random draws; the same seed gives the same interval, whatever the order of clients and seeds.
        resamples: how many are drawn.

    Raises:
        UserError: no seeds, a seed without a client, a value that is not finite, or weights as `read_shares`.

    >>> interval = bootstrap_mean({0: {"ann": 0.4, "bob": 0.6, "cyd": 0.8}})
    >>> round(interval.mean, 3), round(interval.low, 3), round(interval.high, 3), interval.over
    (0.6, 0.4, 0.8, 'clients')
    """
    if not by_seed or not all(by_seed.values()):
        raise UserError("there is nothing to resample; expected one seed or more, each with the value of a client.")
    # By hand: scipy.stats.bootstrap knows no nesting.
    rng = np.random.default_rng(seed)
    groups = []
    for _, values in sorted(by_seed.items()):  # sorted, as are the clients: their order must not change what is drawn
        names = sorted(values)
        numbers = np.asarray([values[name] for name in names], np.float64)
        if not np.isfinite(numbers).all():
            raise UserError("the values to resample are not all finite; leave clients without examples out.")
        shares = read_shares({name: values[name] for name in names}, weights)
        held = shares > 0  # a client that does not count must not be all that a resample holds
        groups.append((numbers[held], shares[held]))
    means = np.asarray([numbers @ shares for numbers, shares in groups])
    drawn = rng.integers(len(groups), size=(resamples, len(groups)))
    found = np.empty(drawn.shape)
    for number, (numbers, shares) in enumerate(groups):
        slots = drawn == number
        found[slots] = _draw_means(rng, numbers, shares, int(slots.sum()))
    low, high = np.quantile(found.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    single = len(groups) == 1
    # Every resample of a single client is that client: an interval of no width would claim certainty.
    if single and len(groups[0][0]) == 1:
        low = high = math.nan
    return Interval(float(means.mean()), float(low), float(high), "clients" if single else "seeds and clients")


def _draw_means(
    rng: np.random.Generator, numbers: np.ndarray, shares: np.ndarray, times: int
) -> Float[np.ndarray, " times"]:
    """Draw so many resamples of the clients and return their weighted means."""
    means = []
    at_once = max(1, DRAWS // len(numbers))
    for start in range(0, times, at_once):
        places = rng.integers(len(numbers), size=(min(at_once, times - start), len(numbers)))
        means.append((numbers * shares)[places].sum(axis=1) / shares[places].sum(axis=1))
    return np.concatenate(means) if means else np.empty(0)


def read_shares(values: Mapping[str, float], weights: Mapping[str, float] | None) -> Float[np.ndarray, " clients"]:
    """Normalise the clients' weights to shares of one, in the order of `values`.

    Raises:
        UserError: weights that are missing, negative or all zero.
    """
    if weights is None:
        return np.full(len(values), 1 / len(values))
    missing = [client for client in values if client not in weights]
    if missing:
        raise UserError(f"no weight for {', '.join(missing[:5])}; expected one for each of {len(values)} clients.")
    given = np.asarray([weights[client] for client in values], np.float64)
    if not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise UserError("client weights must be finite and non-negative, and at least one of them above zero.")
    return given / given.sum()


@dataclass(frozen=True)
class Difference:
    """The difference of two methods a and b on the same clients and seeds.

    Attributes:
        mean: a minus b, averaged over clients within a seed, then over seeds.
        standard_error: of that mean, from the spread between seeds; NaN with a single value.
        low, high: 95 % confidence interval, Student's t; NaN with a single value.
        wins: share of (seed, client) pairs in which a is better, ties counting half.
        seeds: number of seeds.
        clients: number of clients in each of them.
        over: the population of the interval: "seeds", or "clients" where there is a single seed.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    wins: float
    seeds: int
    clients: int
    over: str


def paired_difference(
    a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]], level: float = 0.95
) -> Difference:
    """Compare two methods over seeds and clients, pair by pair.

    The unit is the seed: clients of a seed share a training run, so their differences are averaged first, and Student's
    t over the seed means (n - 1 degrees of freedom) gives the interval, for new seeds of such a population of clients.
    With one seed the unit is the client; such an interval says nothing about other seeds, and is too narrow where
    clients share parameters. No bootstrap: five seeds are too few to resample.

    Args:
        a, b: seed -> client -> value.
        level: the interval's coverage.

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
    error, reach = math.nan, math.nan
    if len(units) > 1:
        from scipy.stats import t  # late: it takes a second to import

        error = float(units.std(ddof=1) / np.sqrt(len(units)))
        reach = error * float(t.ppf((1 + level) / 2, len(units) - 1))
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
