"""What a run may choose about its data: one frozen record, which is also the `--data.*` part of the command line.

Nothing heavy is imported here, because `fedvlm --help` reads this file. The seed is the run's, not the data's: the same
options with another seed give another draw of the same experiment.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fedvlm_jax.errors import UserError

Prompt = Literal["neutral", "client-language"]
Split = Literal["train", "validation", "test"]
Partition = Literal["natural", "dirichlet", "pathological", "quantity", "iid"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of a picture at most, unless the user says otherwise: what Pillow calls safe to decode (256 MiB of RGB)."""

MOST = 2**31 - 1
"""Of anything that is counted."""

OF_PARQUET = frozenset({"limit", "origins", "validation_share", "test_share", "image_root"})
"""What a source in RLAIF-V's columns reads of `NOT_EVERYWHERE`, be it a path or a named set."""

NOT_EVERYWHERE = (
    *("path", "revision", "languages", "vendors", "tasks"),
    *("images_per_client", "validation_per_client", "test_per_client", *sorted(OF_PARQUET)),
)
"""Options that mean nothing for some sources, where choosing one is an error: it would silently do nothing."""

OF_PARTITION: dict[Partition, frozenset[str]] = {
    "natural": frozenset({"partition_by"}),
    "dirichlet": frozenset({"partition_by", "clients", "alpha"}),
    "pathological": frozenset({"partition_by", "clients", "classes_per_client"}),
    "quantity": frozenset({"clients", "alpha"}),
    "iid": frozenset({"clients"}),
}
"""What each partition reads; choosing another of these options is an error."""


@dataclass(frozen=True)
class DataOptions:
    """Which rows there are, whose they are, and how they are asked.

    Raises:
        UserError: at construction, when a value cannot mean anything (a negative count, shares that leave nothing to
            train on, a name twice) or means nothing for this source or partition; the message has the flag, the value
            and what is expected.
    """

    source: Annotated[str, tyro.conf.arg(name="", metavar="NAME|PATH")] = "emoji"
    """emoji (ships), rlaif-v, or a parquet file or folder in RLAIF-V's columns (client, split optional)."""
    path: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the Hugging Face hub)")] = (
        None
    )
    """rlaif-v: folder of the downloaded parquet shards."""
    revision: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: what the hub calls main now)")
    ] = None
    """rlaif-v from the hub: commit, branch or tag; older ones are smaller, so name one for figures that last."""
    image_root: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the data's own folder alone)")
    ] = None
    """parquet, rlaif-v: a second folder for images that are files; paths that lead out of both are not read."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """parquet, rlaif-v: use so many rows, one drawn from each of as many equal stretches; they keep their order."""
    origins: tuple[str, ...] = ()
    """parquet, rlaif-v: use only the rows of these origin_dataset; by default all."""
    partition: Partition = "natural"
    """natural: clients as the data have them; the others cut their rows anew. Ours, not the paper's."""
    partition_by: Annotated[
        str | None, tyro.conf.arg(metavar="KEY", help_behavior_hint="(default: client, origin_dataset; emoji: group)")
    ] = None
    """Key that clients come from: a column, or question_type, generator, labeller. Ours, not the paper's."""
    clients: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="INT",
            help_behavior_hint="(default: 16; emoji: one per style and language)",
            aliases=("--clients",),
        ),
    ] = None
    """emoji, dirichlet, pathological, quantity, iid: number of clients. Ours, not the paper's."""
    classes_per_client: int = 2
    """pathological: values of the key that a client has at most. Ours, not the paper's."""
    held_out_clients: float = 0.0
    """Share of the clients that never train; they serve to try models on newcomers. Ours, not the paper's."""
    prompt: Annotated[
        Prompt | None,
        tyro.conf.arg(
            metavar="{neutral,client-language}",
            help_behavior_hint="(default: client-language; neutral where the data have no question_client)",
        ),
    ] = None
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
    """emoji, dirichlet, quantity: concentration; small = clients unlike, inf = alike. Ours; the paper gives none."""
    validation_share: float = 0.1
    """Share of a client's images to validate on, where there is no split column. Ours, not the paper's."""
    test_share: float = 0.2
    """Share of a client's images to test on, where there is no split column. Ours, not the paper's."""
    min_examples: int = 0
    """Training rows a client needs: natural leaves out smaller ones, others draw again. Ours, not the paper's."""
    max_prompt_tokens: int = 1024
    """Skip rows with longer prompts, image tokens included; Florence-2 has 1024 positions."""
    max_answer_tokens: int = 128
    """Cut longer answers here for training. Ours, not the paper's."""
    max_bad_share: float = 0.01
    """Refuse the data when more of its rows are unusable (broken image, empty text); fewer are skipped and listed."""

    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Skip rows whose image has more pixels (width × height, as its header says); it is not decoded."""

    def __post_init__(self) -> None:
        for name in ("images_per_client", "validation_per_client", "test_per_client", "min_examples"):
            _require(0 <= getattr(self, name) <= MOST, name, getattr(self, name), f"a count of 0 to {MOST}")
        for name in ("max_prompt_tokens", "max_answer_tokens", "classes_per_client", "clients", "limit"):
            value = getattr(self, name)
            _require(value is None or 1 <= value <= MOST, name, value, f"a count of 1 to {MOST}")
        most, pixels = 2 * MAX_IMAGE_PIXELS, self.max_image_pixels
        _require(1 <= pixels <= most, "max_image_pixels", pixels, f"1 to {most}, the most that Pillow decodes")
        _require(0 <= self.held_out_clients < 1, "held_out_clients", self.held_out_clients, "a share below 1")
        for name in ("validation_share", "test_share", "max_bad_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share between 0 and 1")
        _require(
            self.validation_share + self.test_share < 1,
            "validation_share",
            self.validation_share,
            f"less than 1 together with --data.test-share ({self.test_share}), so that rows are left to train on",
        )
        _require(self.alpha > 0, "alpha", self.alpha, "a number above 0, or inf for clients that are alike")
        for name in ("languages", "vendors", "tasks", "origins"):
            chosen = getattr(self, name)
            _require(len(chosen) > 0 or name == "origins", name, chosen, "at least one name")
            _require(len(set(chosen)) == len(chosen), name, chosen, "every name once")
        self._check_meaning()

    @property
    def clients_drawn(self) -> int:
        """How many clients a partition makes that cuts rows anew."""
        return 16 if self.clients is None else self.clients

    def replace(self, **changes: object) -> "DataOptions":
        """The same options with some of them changed (and checked again)."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def _check_meaning(self) -> None:
        """Refuse what was chosen and would do nothing."""
        chosen = [entry.name for entry in dataclasses.fields(self) if getattr(self, entry.name) != entry.default]
        if not chosen:
            return  # as `--help` has it, which so imports no data set, and with none numpy

        from fedvlm_jax.data.sources.registry import find_sets

        sets = find_sets()
        read = {name: entry.options for name, entry in sets.items()}
        own = read.get(self.source, OF_PARQUET)
        for name in (name for name in chosen if name in NOT_EVERYWHERE and name not in own):
            meant = [f"--data {other}" for other in sorted(read) if name in read[other]]
            raise UserError(
                f"{_flag(name)} means nothing for --data {self.source}; it is for "
                f"{', '.join(meant + ['parquet files'] * (name in OF_PARQUET))}. Leave it out."
            )
        if self.path is not None and self.revision is not None:
            raise UserError(f"--data.revision {self.revision} is the hub's; with --data.path {self.path} leave it out.")
        drawn = self.partition != "natural" or self.partition_by is not None
        understood = OF_PARTITION[self.partition] | (frozenset() if drawn else own & {"alpha", "clients"})
        for name in (name for name in chosen if name in frozenset().union(*OF_PARTITION.values()) - understood):
            meant = ", ".join(kind for kind, options in OF_PARTITION.items() if name in options)
            raise UserError(
                f"{_flag(name)} means nothing with --data.partition {self.partition}; it is for {meant}. Leave it out, "
                "or choose another partition."
            )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{_flag(name)} is {value!r}; expected {expected}.")


def _flag(name: str) -> str:
    return f"--data.{name.replace('_', '-')}"
