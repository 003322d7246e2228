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
    """A named data set (emoji: the one that ships), or a parquet file or a folder of parquet shards with RLAIF-V's
    columns and, optionally, client, split and language."""
    prompt: Prompt = "neutral"
    """How a question is put: neutral (the same for every client, column `question`) or client-language (column
    `question_client`). Our choice; the FedVLM paper does not ask in several languages."""
    languages: tuple[str, ...] = ("en", "de", "fr", "es")
    """emoji: the languages of the clients. Our choice; not in the paper."""
    vendors: tuple[str, ...] = ("noto", "twemoji", "fluent", "emojione")
    """emoji: the drawing styles of the clients; one client per vendor and language. Our choice; not in the paper."""
    tasks: tuple[str, ...] = ("group", "subgroup")
    """emoji: what is asked about every image. Our choice; not in the paper."""
    images_per_client: int = 60
    """emoji: training images per client. Fewer are a prefix of more, so comparisons nest. Our choice; not in the
    paper."""
    validation_per_client: int = 30
    """emoji: validation images per client. Our choice; not in the paper."""
    test_per_client: int = 60
    """emoji: test images per client. Our choice; not in the paper."""
    alpha: float = 0.3
    """emoji: how unlike the clients' topics are (Dirichlet concentration over groups): small is unlike, inf is the same
    mix for all. The paper says non-iid without a figure; this one is ours."""
    validation_share: float = 0.1
    """Share of a client's images for validation, where the source has no split column. Our choice; not in the paper."""
    test_share: float = 0.2
    """Share of a client's images for test, where the source has no split column. Our choice; not in the paper."""
    min_examples: int = 0
    """Clients with fewer training rows are left out (0 keeps all, the empty ones too). Our choice; not in the paper."""
    max_prompt_tokens: int = 1024
    """A prompt with more tokens, those of the image included, is skipped. 1024 is all that Florence-2 has positions
    for."""
    max_answer_tokens: int = 128
    """A longer gold answer is cut here. Our choice; not in the paper."""
    max_bad_share: float = 0.01
    """Rows that cannot be used (a broken image, an empty question or answer) are skipped and listed; more than this
    share of them is an error."""

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
