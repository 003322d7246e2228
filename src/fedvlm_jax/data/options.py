"""What a run may choose about its data: one frozen record, which is also the `--data.*` part of the command line.

Nothing heavy is imported here, because `fedvlm --help` reads this file. The seed is the run's, not the data's: the same
options with another seed give another draw of the same experiment.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fedvlm_jax.errors import UserError

Prompt = Literal["neutral", "client-language"]
Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DataOptions:
    """Which rows there are, whose they are, and how they are asked.

    Raises:
        UserError: at construction, when a value cannot mean anything (a negative count, shares that leave nothing to
            train on, a name twice); the message has the flag, the value and what is expected.
    """

    source: Annotated[str, tyro.conf.arg(name="", metavar="NAME|PATH")] = "emoji"
    """emoji (ships with the package), or a parquet file or folder in RLAIF-V's columns (client, split optional)."""
    prompt: Prompt = "neutral"
    """Ask all clients alike (column question), or each in its language (question_client). Ours, not the paper's."""
    languages: tuple[str, ...] = ("en", "de", "fr", "es")
    """emoji: languages; with the vendors they make the clients. Ours, not the paper's."""
    vendors: tuple[str, ...] = ("noto", "twemoji", "fluent", "emojione")
    """emoji: drawing styles; one client per style and language. Ours, not the paper's."""
    tasks: tuple[str, ...] = ("group", "subgroup")
    """emoji: what is asked about every image (group, subgroup, name). Ours, not the paper's."""
    images_per_client: int = 60
    """emoji: training images; fewer are a prefix of more, so comparisons nest. Ours, not the paper's."""
    validation_per_client: int = 30
    """emoji: validation images. Ours, not the paper's."""
    test_per_client: int = 60
    """emoji: test images. Ours, not the paper's."""
    alpha: float = 0.3
    """emoji: Dirichlet concentration of topics; small = clients unlike, inf = alike. Ours; the paper gives none."""
    validation_share: float = 0.1
    """Share of a client's images to validate on, where there is no split column. Ours, not the paper's."""
    test_share: float = 0.2
    """Share of a client's images to test on, where there is no split column. Ours, not the paper's."""
    min_examples: int = 0
    """Leave out clients with fewer training rows; 0 keeps all, empty ones too. Ours, not the paper's."""
    max_prompt_tokens: int = 1024
    """Skip rows with longer prompts, image tokens included; Florence-2 has 1024 positions."""
    max_answer_tokens: int = 128
    """Cut longer answers here for training. Ours, not the paper's."""
    max_bad_share: float = 0.01
    """Refuse the data when more of its rows are unusable (broken image, empty text); fewer are skipped and listed."""

    def __post_init__(self) -> None:
        for name in ("images_per_client", "validation_per_client", "test_per_client", "min_examples"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a count of 0 or more")
        for name in ("max_prompt_tokens", "max_answer_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a count of 1 or more")
        for name in ("validation_share", "test_share", "max_bad_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share between 0 and 1")
        _require(
            self.validation_share + self.test_share < 1,
            "validation_share",
            self.validation_share,
            f"less than 1 together with --data.test-share ({self.test_share}), so that rows are left to train on",
        )
        _require(self.alpha > 0, "alpha", self.alpha, "a number above 0, or inf for clients that are alike")
        for name in ("languages", "vendors", "tasks"):
            chosen = getattr(self, name)
            _require(len(chosen) > 0, name, chosen, "at least one name")
            _require(len(set(chosen)) == len(chosen), name, chosen, "every name once")

    def replace(self, **changes: object) -> "DataOptions":
        """The same options with some of them changed (and checked again)."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"--data.{name.replace('_', '-')} is {value!r}; expected {expected}.")
