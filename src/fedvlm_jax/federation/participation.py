"""Participation in a round: the clients that are drawn, drop out or straggle, and their share of the weight."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.privacy.sampling import Sampling
from fedvlm_jax.utils.random_streams import Stream


def draw_cohort(
    seed: int, round_: int, population: int, cohort: int, sizes: Int[np.ndarray, " population"] | None = None
) -> Int[np.ndarray, " cohort"]:
    """Draw the clients of a round, without replacement and in ascending order; all where the cohort is everybody.

    The choice depends on the seed, the round and the sizes, and on nothing else. With `sizes` clients are drawn one
    after another, each time with chances proportional to the sizes of those who are left: the first to arrive in a race
    of exponential clocks with these rates. Clients of size 0 come last.

    >>> draw_cohort(seed=0, round_=1, population=3, cohort=5).tolist()
    [0, 1, 2]
    """
    if cohort >= population:
        return np.arange(population)
    rng = _start_draw(seed, round_)
    if sizes is None:
        return np.sort(rng.choice(population, cohort, replace=False))
    never = np.full(population, np.inf)
    arrivals = np.divide(-np.log1p(-rng.random(population)), sizes, out=never, where=sizes > 0)
    return np.sort(np.argsort(arrivals, kind="stable")[:cohort])


def draw_members(seed: int, round_: int, sampling: Sampling) -> Int[np.ndarray, " some"]:
    """Draw the clients of a round under differential privacy, in ascending order; there may be none.

    The draw depends on the seed, the round and the sampling, and on nothing else.

    >>> draw_members(0, 1, Sampling("all", population=3, expected=3, places=3)).tolist()
    [0, 1, 2]
    """
    members = deal_groups(seed, sampling.population, sampling.groups)[(round_ - 1) % sampling.groups]
    if sampling.kind == "all":
        return members
    if sampling.kind == "fixed":
        return members[draw_cohort(seed, round_, len(members), sampling.places)]
    clocks = _start_draw(seed, round_).random(len(members))
    # Below q all numbers are alike, so the smallest of them are a cut that prefers nobody.
    first = np.argsort(clocks, kind="stable")[: sampling.places]
    return members[np.sort(first[clocks[first] < sampling.chance])]


def _start_draw(seed: int, round_: int) -> np.random.Generator:
    return np.random.default_rng([Stream.COHORTS, seed, round_])


def deal_groups(seed: int, population: int, groups: int) -> Sequence[Int[np.ndarray, " some"]]:
    """Deal the clients into groups that take turns, the same in all rounds of a seed; sizes differ by one at most.

    >>> sorted(np.concatenate(deal_groups(0, 5, 2)).tolist())
    [0, 1, 2, 3, 4]
    """
    order = np.arange(population)
    if groups > 1:
        order = np.random.default_rng([Stream.GROUPS, seed]).permutation(population)
    return [np.sort(order[group::groups]) for group in range(groups)]


class Turnout(NamedTuple):
    """The work that the clients of a round do."""

    steps: Int[np.ndarray, " cohort"]  # local steps that each takes; 0 for drop-outs
    dropped: Bool[np.ndarray, " cohort"]
    late: Bool[np.ndarray, " cohort"]  # stragglers, who take fewer steps than they should, and count all the same


def draw_turnout(
    seed: int,
    round_: int,
    numbers: Int[np.ndarray, " cohort"],
    steps: Int[np.ndarray, " cohort"],
    options: ParticipationOptions,
) -> Turnout:
    """Draw the drop-outs and stragglers of a cohort, in which a client should take so many local steps.

    What becomes of a client depends on (seed, round, client) and on nothing else: it has three random numbers, at a
    place of one stream that its own number decides. They are the same whatever the chances are, so a higher chance only
    adds to those whom a lower one meets. A client with a single step cannot straggle.
    """
    rng = np.random.default_rng([Stream.TURNOUT, seed, round_])
    leaves, tires, stamina = rng.random((numbers.max(initial=-1) + 1, 3))[numbers].T
    dropped = leaves < options.dropout
    late = ~dropped & (tires < options.stragglers) & (steps > 1)
    fewer = 1 + np.floor(stamina * (steps - 1)).astype(np.int64)
    return Turnout(np.where(dropped, 0, np.where(late, fewer, steps)), dropped, late)


def find_shares(
    sizes: Int[np.ndarray, " population"], weighting: Literal["examples", "uniform"]
) -> Float[np.ndarray, " population"]:
    """Compute each client's share of all clients' weight: by number of examples, or alike over those that have any.

    Where clients are drawn by size and then count alike, that is by examples: so is the objective they average to.

    >>> find_shares(np.asarray([1, 0, 3]), "examples").tolist()
    [0.25, 0.0, 0.75]
    """
    counts = np.asarray(sizes if weighting == "examples" else sizes > 0, np.float64)
    return counts / max(counts.sum(), 1.0)
