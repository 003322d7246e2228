"""Options of a run's data: a record of what all sources read, which each source extends in its own file.

Nothing heavy is imported here and in `sources`, because `fedvlm train --help` reads these files. The seed is the run's:
the same options with another seed give another draw of the same experiment.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import tyro
from annotated_types import Ge, Gt, Le

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import Amount, Chance, Count, Share, check_ranges

if TYPE_CHECKING:
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table

Prompt = Literal["neutral", "client-language"]
Split = Literal["train", "validation", "test"]
Kind = Literal["natural", "dirichlet", "pathological", "quantity", "iid"]

SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)

# Pixels of a picture at most, unless the user says otherwise: what Pillow calls safe to decode (256 MiB of RGB).
MAX_IMAGE_PIXELS = 89_478_485

MOST_PICTURES = 8
"""Pictures of a row at most."""

PICTURE_COLUMNS = ("image", *(f"image_{number}" for number in range(2, MOST_PICTURES + 1)))
"""Columns of a row's pictures, in their order; a table has those after the first only where some row has so many."""

INLINE = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin in base64
FAULT = "why_unusable"  # the column that says why a row cannot be used; a table has it only where there is such a row
TURNS = "prompt_turns"  # the column of a conversation's turns before the answer, as JSON that chat templates take

_SOURCE = (
    "emoji (ships), photos, rlaif-v, a file or folder (parquet, JSON, CSV, pictures, saved by `datasets`), or a hub id."
)
_ALPHA = "Concentration; small = clients unlike, inf = alike. Ours; the paper gives none."
_KIND = "natural: clients as the data have them; the others cut their rows anew. Ours, not the paper's."
_KEY = (
    "Key that makes clients, or in which they differ: a column, or question_type, generator, labeller. Ours, not the "
    "paper's."
)
_DEFAULT_PROMPT = "(default: client-language; neutral where the data have no question_client)"
_DEFAULT_KEY = "(default: client if natural, else origin_dataset; emoji: group)"

Source = Annotated[str, tyro.conf.arg(name="", metavar="NAME|PATH|HUB_ID", help=_SOURCE)]
Alpha = Annotated[float, Gt(0), Le(math.inf), tyro.conf.arg(help=_ALPHA)]
_Kind = Annotated[Kind, tyro.conf.arg(name="partition", help=_KIND)]
_Key = Annotated[
    str | None, tyro.conf.arg(name="partition-by", metavar="KEY", help=_KEY, help_behavior_hint=_DEFAULT_KEY)
]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Partition of rows among clients; each kind has the options that it reads"""

    kind: _Kind = "natural"


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """Clients as the data have them"""

    by: _Key = None


@dataclass(frozen=True, kw_only=True)
class Drawn(Partition):
    """Clients that are drawn over images"""

    clients: Annotated[Count, tyro.conf.arg(aliases=("--clients",))] = 16
    """Number of clients. Ours, not the paper's."""


@dataclass(frozen=True, kw_only=True)
class Iid(Drawn):
    """Images dealt evenly"""

    kind: _Kind = "iid"


@dataclass(frozen=True, kw_only=True)
class Quantity(Drawn):
    """Clients of unlike size"""

    kind: _Kind = "quantity"
    alpha: Alpha = 0.3


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Drawn):
    """Clients of unlike mixes of a key's values"""

    kind: _Kind = "dirichlet"
    by: _Key = None
    alpha: Alpha = 0.3


@dataclass(frozen=True, kw_only=True)
class Pathological(Drawn):
    """Clients with few of a key's values"""

    kind: _Kind = "pathological"
    by: _Key = None
    classes_per_client: Count = 2
    """Values of the key that a client has at most. Ours, not the paper's."""


PARTITIONS: dict[str, type[Partition]] = {k().kind: k for k in (Natural, Dirichlet, Pathological, Quantity, Iid)}

PLANNED = ("max_prompt_tokens", "max_answer_tokens", "class_prompt", "agreed_classes", "agreed_novel")
"""Options of the data that a deployment's plan has, the same at every node."""


@dataclass(frozen=True)
class DataOptions:
    """Rows in use, whose they are, and how they are asked; a `UserError` where a value cannot mean anything."""

    source: Source = "emoji"
    partition: Annotated[Partition, tyro.conf.arg(name="")] = field(default_factory=Natural)
    held_out_clients: Chance = 0.0
    """Share of the clients that never train; they serve to try models on newcomers. Ours, not the paper's."""
    prompt: Annotated[
        Prompt | None, tyro.conf.arg(metavar="{neutral,client-language}", help_behavior_hint=_DEFAULT_PROMPT)
    ] = None
    """Ask all clients alike (column question), or each in its language (question_client). Ours, not the paper's."""
    novel_classes: Chance = 0.0
    """Share of the different answers that nobody trains or validates on: their rows of these splits are left out, so
    that test rows ask about novel classes too. Drawn by the seed. Ours, not the paper's."""
    class_prompt: str = "a photo of a {}."
    """Where the model chooses among the data's answers (CLIP): what it reads in place of each, {} being the answer.
    CLIP's own for photographs."""
    agreed_classes: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """From a deployment's plan or Python only: the classes to train among, in place of the answers that the data hold,
    on which clients that do not see each other's rows have agreed."""
    agreed_novel: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """Beside them, the classes that nobody trains on and test rows ask about."""
    min_examples: Amount = 0
    """Training rows a client needs: natural leaves out smaller ones, others draw again. Ours, not the paper's."""
    max_prompt_tokens: Count = 1024
    """Skip rows with longer prompts, image tokens included; Florence-2 has 1024 positions."""
    max_answer_tokens: Count = 128
    """Cut longer answers here for training. Ours, not the paper's."""
    max_bad_share: Share = 0.01
    """Refuse the data when more of its rows are unusable (broken image, empty text); fewer are skipped and listed."""
    max_image_pixels: Annotated[int, Ge(1), Le(2 * MAX_IMAGE_PIXELS)] = MAX_IMAGE_PIXELS
    """Skip rows whose image has more pixels (width × height, as its header says); it is not decoded."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if self.class_prompt.count("{}") != 1:
            raise UserError(
                f"--data.class-prompt is {self.class_prompt!r}: it must have {{}} once, where the answer stands"
            )

    @property
    def place(self) -> tuple[Any, ...]:
        """Return all that the opened rows depend on: runs that cut them otherwise share what was read."""
        names = ("source", "path", "image_root", "revision", "max_image_pixels")
        own = ("form", "config", "splits", "reading", "scenario")  # of the forms that one's own data may have
        return tuple(getattr(self, name, None) for name in names + own)

    def read(self) -> "Table":
        """Open the rows, as the source does it."""
        raise NotImplementedError

    def federate(self, table: "Table", seed: int) -> "Federation":
        """Cut the rows into clients, as the source does it."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Self:
        """Return the same options with some of them changed (and checked again)."""
        return dataclasses.replace(self, **changes)


def check_names(flag: str, names: tuple[str, ...]) -> None:
    """Refuse a name that is given twice."""
    if len(set(names)) < len(names):
        raise UserError(f"{flag} is {' '.join(names)}: it must have every name once")
