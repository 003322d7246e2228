"""Options of the objective, the `--preference.*` ones; imports nothing heavy, for `fedvlm --help` reads this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Le

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import Positive, Share, check_ranges

REWARDS = ("exact-match", "token-f1", "brevity", "cider", "file")
"""Names of rewards; each is the function of `answer_rewards` with that name."""


@dataclass(frozen=True)
class PreferenceOptions:
    """Learning of preferences (--objective dpo, sft+dpo) and of rewards (--objective reward)

    Raises:
        UserError: at construction, when a value cannot mean anything; the message has the flag, the value and what is
            expected.
    """

    beta: Positive = 0.1
    """Pull towards the base, arXiv 2305.18290's beta; tau for ipo; the KL's weight in reward. length-normalised wants
    some 50 times as much (not given by the paper)."""
    variant: Literal["sigmoid", "length-normalised", "ipo"] = "sigmoid"
    """DPO as published, on whole answers; on means per token (arXiv 2411.15124); or IPO (arXiv 2310.12036), here also
    on means per token (not given by the paper)."""
    label_smoothing: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """Probability that a pair is the wrong way round, up to 0.5; not with ipo (not given by the paper)."""
    sft_weight: Positive = 1.0
    """sft+dpo: weight of the chosen answer's cross-entropy beside the preference loss (not given by the paper)."""

    rewards: Annotated[tuple[str, str], tyro.conf.arg(metavar=f"{{{','.join(REWARDS)}}} {{...}}")] = (
        "token-f1",
        "brevity",
    )
    """reward: the two that are mixed, by an answer's tokens: equal to the gold answer's, F1 with them, 1 / their
    number, CIDEr-D / 10, what a file has for them (the paper's are helpful and safe, by models)."""
    reward_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """reward: JSON lines or CSV that the reward `file` reads: per line an answer and its reward from 0 to 1, and where
    it is not for all the question and the client (not given by the paper)."""
    mix: tuple[Share, ...] = (0.5,)
    """reward: weights of the first of them, dealt to the clients in turn, client k getting the k-th, over and over;
    the second one's is the rest (not given by the paper)."""
    samples: Annotated[int, Ge(2), Le(64)] = 4
    """reward: answers drawn to each question in a step; each is compared with the others (not given by the paper)."""

    def __post_init__(self) -> None:
        check_ranges(self, "preference")
        if not self.mix:
            raise UserError("--preference.mix is empty: give a weight between 0 and 1, or several")
        for name in self.rewards:
            if name not in REWARDS:
                raise UserError(f"--preference.rewards {name}: there are {', '.join(REWARDS)}")
        if len({*self.rewards}) < 2:
            raise UserError(f"--preference.rewards names {self.rewards[0]} twice: a mix is of two")
        if "file" in self.rewards and self.reward_file is None:
            raise UserError("--preference.rewards file: say which with --preference.reward-file")
        if self.reward_file is not None and "file" not in self.rewards:
            raise UserError(
                f"--preference.reward-file {self.reward_file}: no reward reads it; name file among "
                "--preference.rewards, or leave it out"
            )
        if self.variant == "ipo" and self.label_smoothing:
            raise UserError(
                f"--preference.label-smoothing is {self.label_smoothing}: it must be 0 with --preference.variant ipo, "
                "whose margin has a finite target anyway"
            )
