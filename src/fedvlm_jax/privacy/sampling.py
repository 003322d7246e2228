"""Sampling of a round's clients under differential privacy: what the draw, the noise and the accountant agree on.

ε depends on how clients are drawn, and on a denominator that no draw changes: the sum of a round's updates is divided
by the number of clients that a round has on average, whoever came. Rounds have fixed shapes, so a Poisson sample has
places for few more than its mean, and is cut at random where it is larger (truncated Poisson sampling).

With noise that is correlated over b rounds (arXiv 2306.08153) a client takes part at most once in so many. So the
clients are dealt into b groups, and in round t those of group t mod b are drawn from, each with b times the chance.
"""

from typing import Literal, NamedTuple

from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.config import PrivacyOptions

OVERFLOW = 1e-9
"""Chance of a round that draws more clients than it has places for; the others are then cut at random."""


class Sampling(NamedTuple):
    """The sampling of a run's rounds.

    Attributes:
        kind: as `--privacy.sampling` has it.
        population: N, clients that train.
        expected: m, clients of a round on average: the fixed denominator.
        places: K, the most clients that a round has.
        groups: b, of which one after another has its turn; 1 without correlated noise.
    """

    kind: Literal["poisson", "fixed", "all"]
    population: int
    expected: float
    places: int
    groups: int = 1

    @property
    def chance(self) -> float:
        """q, the chance of a client to be drawn when it is its group's turn.

        >>> Sampling("poisson", population=100, expected=5, places=20, groups=4).chance
        0.2
        """
        return min(1.0, self.expected * self.groups / self.population)

    @property
    def largest_group(self) -> int:
        """Clients of the largest group.

        >>> Sampling("all", population=10, expected=2.5, places=3, groups=4).largest_group
        3
        """
        return -(-self.population // self.groups)

    def turns(self, rounds: int) -> int:
        """Count the rounds in which a client can be drawn, at most.

        >>> Sampling("poisson", population=100, expected=5, places=20, groups=4).turns(10)
        3
        """
        return -(-rounds // self.groups)


def plan_sampling(options: PrivacyOptions, population: int, cohort: int | None) -> Sampling:
    """Plan how rounds draw of so many clients that train; `cohort` is a round's on average, None for everybody.

    Raises:
        UserError: there are not so many clients, or not in each of the groups that take turns.

    >>> plan_sampling(PrivacyOptions(noise=1), population=1000, cohort=10)
    Sampling(kind='poisson', population=1000, expected=10, places=34, groups=1)
    """
    groups = options.bands if options.mechanism == "banded" else 1
    if groups > population:
        raise UserError(
            f"--privacy.bands {groups}: clients take turns in so many groups, and only {population} train: use fewer"
        )
    smallest = population // groups
    if options.sampling == "all":
        if cohort is not None and cohort < population:
            raise UserError(
                f"--privacy.sampling all has everybody in every round, and --cohort {cohort} does not: leave one out"
            )
        return Sampling("all", population, population / groups, -(-population // groups), groups)
    expected = smallest if cohort is None else cohort
    if expected > smallest:
        among = f"{smallest} clients in a group (--privacy.bands {groups})" if groups > 1 else f"{population} clients"
        raise UserError(f"--cohort {cohort}: there are only {among} that train: lower it")
    if options.sampling == "fixed":
        return Sampling("fixed", population, expected, expected, groups)
    largest = -(-population // groups)
    places = choose_places(largest, expected * groups / population * largest)
    return Sampling("poisson", population, expected, places, groups)


def choose_places(population: int, expected: float) -> int:
    """Choose the places of a Poisson sample: the fewest that it needs more than with a chance below `OVERFLOW`.

    >>> choose_places(1000, 10), choose_places(16, 8), choose_places(16, 16)
    (34, 16, 16)
    """
    from scipy.stats import binom  # late: it takes half a second

    if expected >= population:
        return population
    found = int(binom.isf(OVERFLOW, population, expected / population))
    # `isf` is exact up to rounding: step to the fewest.
    while found > 1 and binom.sf(found - 1, population, expected / population) < OVERFLOW:
        found -= 1
    while found < population and binom.sf(found, population, expected / population) >= OVERFLOW:
        found += 1
    return found
