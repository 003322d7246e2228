"""Options of differential privacy. None of it is given by the FedVLM paper.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from fedvlm_jax.utils.option_ranges import Count, NonNegative, Positive


@dataclass(frozen=True)
class PrivacyOptions:
    """Client-level differential privacy of what is shared (DP-FedAvg, arXiv 1710.06963)"""

    noise: NonNegative = 0.0
    """Noise multiplier z: the sum of a round's updates gets Gaussian noise of standard deviation z times the clipping
    norm, in every entry. 0 for none, or for what --privacy.epsilon asks for."""
    epsilon: NonNegative = 0.0
    """Without --privacy.noise: choose it so that all rounds together spend this epsilon. With it: stop before a round
    that would spend more. 0 for no bound."""
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    """Chance that epsilon does not hold; well below 1 / clients."""
    clip: Positive = 1.0
    """Norm that a client's whole update is clipped to; with --privacy.quantile only what it is at first."""
    quantile: Annotated[float, Gt(0), Lt(1)] | None = None
    """Let the clipping norm follow this quantile of the clients' norms, found privately (arXiv 1905.03871)."""
    sampling: Literal["poisson", "fixed", "all"] = "poisson"
    """How a round's clients are drawn, which decides what epsilon is: each with the same chance, --cohort on average;
    exactly --cohort; or everybody, in every round. Only `all` goes without --cohort."""
    mechanism: Literal["gaussian", "banded"] = "gaussian"
    """Noise that is drawn anew in every round, or that later rounds take back in part (banded matrix, arXiv
    2306.08153), which the sum of many rounds gains by."""
    bands: Count = 4
    """Rounds that the noise of `banded` is correlated over; a client takes part at most once in so many."""
    secret: bool = False
    """Draw the noise, and who takes part, from the system's randomness, which config.json keeps, and not from --seed,
    which others can guess: with what guards them known, epsilon protects nobody. For what is to be released."""

    @property
    def on(self) -> bool:
        """Say whether any is asked for."""
        return self.noise > 0 or self.epsilon > 0
