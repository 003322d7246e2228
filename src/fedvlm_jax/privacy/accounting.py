"""ε of a run's releases, computed by dp-accounting: of so many rounds; and the noise, or the rounds, for a given ε.

A release is the sum of a round's clipped messages with noise of standard deviation z times the clipping norm. What ε it
comes to depends on how the round's clients are drawn, so each way has an event of its own:

    poisson  each client with chance q, and at most K of them: truncated Poisson sampling (arXiv 2508.15089). Two
             populations are neighbours if one has a client more.
    fixed    m of N without replacement. Populations are neighbours if one client is another there, which moves the sum
             by up to 2 C: in the accountant's terms the noise is z / 2. Rényi differential privacy alone has a bound.
    all      everybody: the Gaussian mechanism without amplification; neighbours as with poisson.

Clients have states, private factors say, that change where they are drawn. With poisson the others' draws say nothing
of a client's, so given all of them each round is the event above, whatever its own state. With fixed they do, and so,
in a round that is cut, with poisson: that others' states tell of a client's draw is not accounted for.

With b groups that take turns, noise is correlated over b rounds by a lower triangular matrix C of b bands whose columns
have norm 1 at most (arXiv 2306.08153). The columns of the rounds of one group have no row in common, and the rounds
between see this group's clients through what was released before alone. So, whatever later rounds make of that, each
round of a group is a Gaussian mechanism of noise z on its draw, and a client is in ⌈T / b⌉ of them (theorem 4 there).
"""

import itertools
import logging
import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.privacy.sampling import Sampling

LARGE = 100.0
"""An ε that protects nobody: from here on the fast bound is enough, since the exact one would take gigabytes."""
DIGITS = 5
"""Significant digits of a noise multiplier that is chosen."""
LEAST, MOST = 1e-3, 1e6
"""Noise multipliers that are tried."""


def find_epsilon(noise: float, sampling: Sampling, rounds: int, delta: float) -> float:
    """Compute ε of so many rounds at δ, by privacy loss distributions, or by Rényi's where those know no such event.

    Never below the true one, but for rounding.

    Args:
        noise: z, the standard deviation of the noise over the clipping norm.
        sampling: of the rounds' clients.
        rounds, delta: T and δ.

    Raises:
        UserError: dp-accounting is not installed.

    >>> round(find_epsilon(5.0, Sampling("all", population=20, expected=20, places=20), rounds=100, delta=1e-5), 3)
    9.997
    """
    # Of a sample that is not cut, for a small δ may be spent on the cut alone.
    bound = bound_epsilon(noise, sampling._replace(places=sampling.population), rounds, delta)
    if bound == 0 or bound > LARGE or sampling.kind == "fixed":
        return bound
    return float(_compose(noise, sampling, sampling.turns(rounds)).get_epsilon_for_delta(delta))


def bound_epsilon(noise: float, sampling: Sampling, rounds: int, delta: float) -> float:
    """Bound ε of so many rounds at δ by Rényi differential privacy: too high by a tenth to two thirds, and fast.

    Where a group has more clients than a round has places, the chance that a round overflows is taken off δ: unless the
    others of a client's group leave it no place, truncated sampling is Poisson sampling.

    Raises:
        UserError: dp-accounting is not installed.

    >>> round(bound_epsilon(5.0, Sampling("all", population=20, expected=20, places=20), rounds=100, delta=1e-5), 3)
    10.726
    """
    count, dp = sampling.turns(rounds), import_accounting()
    if not count:
        return 0.0
    left = delta - count * _chance_of_overflow(sampling)
    if not noise or left <= 0:
        return math.inf
    relation, event = dp.NeighboringRelation.ADD_OR_REMOVE_ONE, dp.GaussianDpEvent(noise)
    if sampling.kind == "fixed":
        relation, event = dp.NeighboringRelation.REPLACE_ONE, dp.GaussianDpEvent(noise / 2)
        smallest = sampling.population // sampling.groups
        event = dp.SampledWithoutReplacementDpEvent(smallest, int(sampling.expected), event)
    elif sampling.kind == "poisson":
        event = dp.PoissonSampledDpEvent(sampling.chance, event)
    with _quiet():
        return float(dp.rdp.RdpAccountant(neighboring_relation=relation).compose(event, count).get_epsilon(left))


@lru_cache(maxsize=64)  # the runs of a comparison ask alike
def find_noise(sampling: Sampling, rounds: int, delta: float, epsilon: float) -> float:
    """Find the smallest noise multiplier, to five digits, with which so many rounds spend this ε at most.

    Raises:
        UserError: no noise is enough, or dp-accounting is not installed.
    """
    # A cut that is as rare as `choose_places` has it changes the sixth digit, and takes five times as long.
    easy = sampling._replace(places=sampling.population)
    found = _search(easy, rounds, delta, epsilon, near=1.0)
    if find_epsilon(_round_up(found, 1), sampling, rounds, delta) > epsilon:
        found = _search(sampling, rounds, delta, epsilon, near=found)
    rounded = (_round_up(found, steps) for steps in itertools.count())
    return next(noise for noise in rounded if find_epsilon(noise, sampling, rounds, delta) <= epsilon)


def choose_noise(options: PrivacyOptions, sampling: Sampling, rounds: int) -> float:
    """Choose the noise multiplier: what the options say, or what spends their ε over so many rounds.

    Raises:
        UserError: no noise is enough, or dp-accounting is not installed.

    >>> choose_noise(PrivacyOptions(noise=1.5), Sampling("all", population=9, expected=9, places=9), rounds=3)
    1.5
    """
    return options.noise or find_noise(sampling, rounds, options.delta, options.epsilon)


def _search(sampling: Sampling, rounds: int, delta: float, epsilon: float, near: float) -> float:
    """Find the noise multiplier at which ε is reached, from one that is near."""
    from scipy.optimize import brentq  # late: it takes half a second

    def excess(log_noise: float) -> float:
        return math.log(max(find_epsilon(math.exp(log_noise), sampling, rounds, delta), 1e-12) / epsilon)

    low = high = math.log(near)
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(MOST):
            raise UserError(
                f"--privacy.epsilon {epsilon:g} at --privacy.delta {delta:g} cannot be kept to over {rounds} rounds, "
                "whatever the noise: raise it, or take fewer rounds"
            )
    while low == high or excess(low) <= 0:
        low, high = low - math.log(2), low
        if low < math.log(LEAST):
            raise UserError(f"--privacy.epsilon {epsilon:g} protects nobody: lower it, or leave it out")
    return math.exp(cast("float", brentq(excess, low, high, xtol=1e-7)))


def _round_up(number: float, steps: int) -> float:
    """Round up to so many digits, and then so many steps further."""
    step = 10.0 ** (math.floor(math.log10(number)) + 1 - DIGITS)
    return float(f"{(math.ceil(number / step) + steps) * step:.{DIGITS}g}")


def count_rounds(noise: float, sampling: Sampling, delta: float, epsilon: float, most: int) -> int:
    """Count the rounds, `most` at most, that together spend this ε at most; 0 where the first one spends more.

    Raises:
        UserError: dp-accounting is not installed.
    """
    if find_epsilon(noise, sampling, most, delta) <= epsilon:
        return most
    low, high = 0, most  # ε of `low` rounds is not above, that of `high` is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if find_epsilon(noise, sampling, middle, delta) <= epsilon else (low, middle)
    return low


def import_accounting() -> Any:
    """Import dp-accounting.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module("dp_accounting")
    except ImportError:
        raise UserError(
            "--privacy needs the package dp-accounting, which is not installed: pip install '.[privacy]' in a clone"
        ) from None


def _chance_of_overflow(sampling: Sampling) -> float:
    """Return the chance that the others of a client's group leave it no place in a round."""
    from scipy.stats import binom

    if sampling.kind != "poisson" or sampling.places >= sampling.largest_group:
        return 0.0
    return float(binom.sf(sampling.places - 1, sampling.largest_group - 1, sampling.chance))


def _compose(noise: float, sampling: Sampling, count: int) -> Any:
    """Return the privacy loss distribution of so many rounds of a group."""
    if sampling.kind == "all":
        return _losses().from_gaussian_mechanism(noise / math.sqrt(count))
    return _find_losses(noise, sampling).self_compose(count)


@lru_cache(maxsize=4)  # a run asks for many numbers of rounds, and the first step takes longest
def _find_losses(noise: float, sampling: Sampling) -> Any:
    if sampling.places >= sampling.largest_group:
        return _losses().from_gaussian_mechanism(noise, sampling_prob=sampling.chance)
    return _losses().from_truncated_subsampled_gaussian_mechanism(
        dataset_size=sampling.largest_group,
        sampling_probability=sampling.chance,
        truncated_batch_size=sampling.places,
        noise_multiplier=noise,
    )


def _losses() -> Any:
    return import_module("dp_accounting.pld.privacy_loss_distribution")


@contextmanager
def _quiet() -> Generator[None]:
    """Leave out what the accountant says of single orders that do not converge: it takes the best of the others."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
