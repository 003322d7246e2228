"""What a run may choose about its objective: one frozen record, which is also the `--preference.*` options.

Nothing heavy is imported here, because `fedvlm --help` reads this file.
"""

from dataclasses import dataclass
from typing import Literal

from fedvlm_jax.errors import UserError

__all__ = ["PreferenceOptions", "Variant"]

Variant = Literal["sigmoid", "length-normalised", "ipo"]


@dataclass(frozen=True)
class PreferenceOptions:
    """How the preference for the chosen answer is learnt: --objective dpo and sft+dpo

    Raises:
        UserError: at construction, when a value cannot mean anything; the message has the flag, the value and what is
            expected.
    """

    beta: float = 0.1
    """Pull towards the base, arXiv 2305.18290's beta; tau for ipo. length-normalised wants some 50 times as much (not
    given by the paper)."""
    variant: Variant = "sigmoid"
    """DPO as published, on whole answers; on means per token (arXiv 2411.15124); or IPO (arXiv 2310.12036), here also
    on means per token (not given by the paper)."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round, up to 0.5; not with ipo (not given by the paper)."""
    sft_weight: float = 1.0
    """sft+dpo: weight of the chosen answer's cross-entropy beside the preference loss (not given by the paper)."""

    def __post_init__(self) -> None:
        _require(0 < self.beta < float("inf"), "beta", self.beta, "a number above 0")
        _require(0 <= self.label_smoothing <= 0.5, "label_smoothing", self.label_smoothing, "a share from 0 to 0.5")
        _require(0 < self.sft_weight < float("inf"), "sft_weight", self.sft_weight, "a number above 0")
        _require(
            self.variant != "ipo" or self.label_smoothing == 0,
            "label_smoothing",
            self.label_smoothing,
            "0 with --preference.variant ipo, whose margin has a finite target anyway",
        )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"--preference.{name.replace('_', '-')} is {value!r}; expected {expected}.")
