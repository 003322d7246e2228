"""A run's privacy once its clients are known: the noise that its ε needs, or the rounds that its ε allows.

It is settled before anything is trained and stored with the run, so whoever goes on with the run goes on with it.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.accounting import bound_epsilon, choose_noise, count_rounds, find_epsilon
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.privacy.sampling import Sampling, plan_sampling
from fedvlm_jax.utils.serialization import decode, encode

COVERED = "what the server releases of all rounds: the shared part of the adapters"
"""The part that ε holds for, as results and reports put it."""
FROM_SEED = "; nor does it hold for who knows or guesses the run's seed, from which noise and draws of clients come"
"""What else it says nothing of without `--privacy.secret`."""
FIXED = "; and what the others' private factors and optimiser states tell of whether a client was drawn"
"""What else it says nothing of where a fixed number is drawn, see `privacy.accounting`."""
NOT_COVERED = (
    "private factors and optimiser states, which stay with their clients; and losses, norms and scores on validation "
    "and test data, which are computed without noise"
)
"""The part that it says nothing of."""


@dataclass(frozen=True)
class Budget:
    """The privacy of a run of known clients.

    Attributes:
        noise: z; of the update and of the count of norms together where the clipping norm adapts.
        clip: C, or what it is at first.
        quantile: of the norms that C follows, or None.
        delta: δ.
        limit: the most ε, or 0 for no bound.
        rounds: that the run may have: those that are asked for, or fewer, after which the limit is reached.
        epsilon: of all these rounds.
        mechanism, sampling: as the options name them.
        clients: N, that train.
        expected: m, clients of a round on average: the denominator.
        places: K, the most clients of a round.
        chance: q, of a client to be drawn when it is its group's turn.
        groups: that take turns; 1 but with correlated noise.
        secret: what noise and draws of clients come from, in hexadecimal digits; "" for the run's seed. It is nobody's
            but the run's: `publish_budget` leaves it out.
    """

    noise: float
    clip: float
    quantile: float | None
    delta: float
    limit: float
    rounds: int
    epsilon: float
    mechanism: Literal["gaussian", "banded"]
    sampling: Literal["poisson", "fixed", "all"]
    clients: int
    expected: float
    places: int
    chance: float
    groups: int
    secret: str = ""

    @property
    def drawn(self) -> Sampling:
        """Return how a round's clients are drawn."""
        return Sampling(self.sampling, self.clients, self.expected, self.places, self.groups)

    def spent(self, rounds: int) -> float:
        """Compute ε of the first so many rounds; later ones than the last release nothing."""
        return find_epsilon(self.noise, self.drawn, min(rounds, self.rounds), self.delta)

    def bound(self, rounds: int) -> float:
        """Bound that ε, fast."""
        return bound_epsilon(self.noise, self.drawn, min(rounds, self.rounds), self.delta)


def settle(options: PrivacyOptions, clients: int, cohort: int | None, rounds: int) -> Budget:
    """Settle the privacy of a run of so many clients that train, so many rounds at most.

    Raises:
        UserError: δ is too large for so many clients, not a single round can be had for this ε, so many clients cannot
            be drawn, or dp-accounting is not installed.

    >>> budget = settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=69)
    >>> budget.rounds, round(budget.epsilon, 2)
    (69, 7.97)
    """
    if options.delta * clients >= 1:
        raise UserError(
            f"--privacy.delta {options.delta:g} is not below 1 / {clients:,} clients that train: it would allow one of "
            f"them to be published whole. Take a tenth of that or less, {0.1 / clients:.1g}"
        )
    drawn = plan_sampling(options, clients, cohort)
    noise = choose_noise(options, drawn, rounds)
    if options.quantile is not None:
        from fedvlm_jax.privacy.gaussian import split_noise  # late: it imports jax

        split_noise(noise, drawn.expected)  # refuses rounds of too few clients
    possible = rounds
    if options.epsilon and not (possible := count_rounds(noise, drawn, options.delta, options.epsilon, rounds)):
        raise UserError(
            f"--privacy.epsilon {options.epsilon:g}: the first round spends "
            f"{find_epsilon(noise, drawn, 1, options.delta):.3g} already; raise it, or --privacy.noise {noise:g}"
        )
    spent = find_epsilon(noise, drawn, possible, options.delta)
    if not math.isfinite(spent):
        raise UserError(
            f"--privacy.delta {options.delta:g}: rounds of such noise have no finite epsilon at so small a delta; "
            "raise it, or --privacy.noise"
        )
    return Budget(
        noise=noise,
        clip=options.clip,
        quantile=options.quantile,
        delta=options.delta,
        limit=options.epsilon,
        rounds=possible,
        epsilon=spent,
        mechanism=options.mechanism,
        sampling=options.sampling,
        clients=clients,
        expected=drawn.expected,
        places=drawn.places,
        chance=drawn.chance,
        groups=drawn.groups,
    )


def lengthen_budget(budget: Budget, rounds: int) -> Budget:
    """Return the budget of a run that is to have more rounds, with the noise that it had.

    Raises:
        UserError: its ε does not allow so many, or its noise was planned for those that it has.
    """
    drawn, delta = budget.drawn, budget.delta
    if budget.mechanism == "banded":
        raise UserError(
            f"--train.rounds {rounds}: the noise of --privacy.mechanism banded is planned for the {budget.rounds} "
            "rounds that there are; more need a new run"
        )
    if budget.limit and (most := count_rounds(budget.noise, drawn, delta, budget.limit, rounds)) < rounds:
        raise UserError(
            f"--train.rounds {rounds}: epsilon {budget.limit:g} of the run is spent after {most} rounds; what is "
            "released cannot be taken back, so more need a new run with another --privacy.epsilon"
        )
    return replace(budget, rounds=rounds, epsilon=find_epsilon(budget.noise, drawn, rounds, delta))


def describe_sampling(budget: Budget) -> str:
    """Say how a round's clients are drawn.

    >>> describe_sampling(settle(PrivacyOptions(noise=1.0), clients=1000, cohort=10, rounds=1))
    'each of 1,000 clients with chance 0.01, 10 on average and 34 at most'
    """
    turns = f", in {budget.groups} groups that take turns" if budget.groups > 1 else ""
    if budget.sampling == "all":
        return f"all of {budget.clients:,} clients{turns}"
    if budget.sampling == "fixed":
        return f"exactly {budget.expected:g} of {budget.clients:,} clients{turns}"
    chance = f"each of {budget.clients:,} clients{turns} with chance {budget.chance:.3g}"
    return f"{chance}, {budget.expected:g} on average and {budget.places} at most"


def describe_budget(budget: Budget, asked: int) -> str:
    """Say in a line what a run's privacy comes to, and where it stops before the rounds that were asked for.

    >>> budget = settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=69)
    >>> describe_budget(replace(budget, limit=8.0), 100).rpartition("; ")[2]
    'stops after 69 of 100 rounds, where epsilon 8 is spent'
    """
    text = (
        f"differential privacy of clients: {describe_sampling(budget)}; noise multiplier {budget.noise:g}, clipping "
        f"norm {budget.clip:g}; epsilon {budget.epsilon:.3g} at delta {budget.delta:g} after {budget.rounds} rounds"
    )
    if budget.rounds < asked:
        text += f"; stops after {budget.rounds} of {asked} rounds, where epsilon {budget.limit:g} is spent"
    return text


def draw_secret() -> str:
    """Draw what noise and draws of clients come from: 128 bits of the system's randomness."""
    return secrets.token_hex(16)


def publish_budget(budget: Budget) -> dict[str, Any]:
    """Return a budget for a file that others may see: without its secret.

    >>> budget = settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=1)
    >>> publish_budget(replace(budget, secret="ab")) == publish_budget(budget)
    True
    """
    return {name: value for name, value in encode(budget).items() if name != "secret"}


def describe_coverage(budget: Budget) -> dict[str, Any]:
    """Describe the privacy of a finished run for its results."""
    missing = NOT_COVERED + (FIXED if budget.sampling == "fixed" else "") + ("" if budget.secret else FROM_SEED)
    return {**publish_budget(budget), "covers": COVERED, "does_not_cover": missing}


def describe_subject(stored: Mapping[str, Any]) -> str:
    """Say in few words of what the ε of a finished run is, and on which condition.

    >>> budget = settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=1)
    >>> describe_subject(describe_coverage(budget))
    'of what is shared, if nobody knows the seed'
    >>> describe_subject(describe_coverage(replace(budget, secret="ab")))
    'of what is shared'
    """
    return "of what is shared" + (", if nobody knows the seed" if FROM_SEED in stored["does_not_cover"] else "")


def read_coverage(stored: Mapping[str, Any]) -> Budget:
    """Read the budget that `describe_coverage` described; its secret stays with the run.

    Raises:
        UserError: something of it is missing, or of another type.

    >>> budget = settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=1)
    >>> read_coverage(describe_coverage(budget)) == budget
    True
    """
    own = {name: value for name, value in stored.items() if name not in ("covers", "does_not_cover")}
    return decode(Budget, {**own, "secret": ""}, "privacy")
