"""Options of rows that are cut into clients by column, and of the forms that people's own data have.

Nothing heavy is imported here, because `fedvlm --help` reads this file.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from fedvlm_jax.data.config import DataOptions, Source, check_names
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.detection import FORMS, list_forms
from fedvlm_jax.records.files import Content, Part, Record
from fedvlm_jax.utils.option_ranges import Count, Share

if TYPE_CHECKING:
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table


_FORM = f"What the data are ({', '.join(FORMS)}); it is found by their content."
Form = Annotated[str, tyro.conf.arg(metavar="NAME", help=_FORM, help_behavior_hint="(default: as found)")]


class Reading(NamedTuple):
    """How records become rows: names of columns (ours, theirs), a question, each turn or the last, a folder level."""

    columns: tuple[tuple[str, str], ...] = ()
    question: str = ""
    each: bool = False
    client_folder: int | None = None


@dataclass(frozen=True)
class RowOptions(DataOptions):
    """Rows that are cut into clients by column"""

    source: Source = ""
    image_root: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the data's own folder alone)")
    ] = None
    """A second folder for images that are files; paths that lead out of both are not read."""
    limit: Annotated[Count | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Use so many rows, one drawn from each of as many equal stretches; they keep their order."""
    origins: tuple[str, ...] = ()
    """Use only the rows of these origin_dataset; by default all."""
    validation_share: Share = 0.1
    """Share of a client's images to validate on, where there is no split column. Ours, not the paper's."""
    test_share: Share = 0.2
    """Share of a client's images to test on, where there is no split column. Ours, not the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("--data.origins", self.origins)
        if self.validation_share + self.test_share >= 1:
            raise UserError(
                f"--data.validation-share is {self.validation_share}: it must be less than 1 together with "
                f"--data.test-share ({self.test_share}), so that rows are left to train on"
            )

    def read(self) -> "Table":
        """Open the rows, with the second folder for images."""
        root = self.image_root and self.image_root.expanduser()
        if root is not None and not root.is_dir():
            raise UserError(f"--data.image-root {root} is no folder; expected the one that holds the images.")
        table = self.read_rows()
        return table if root is None else dataclasses.replace(table, image_root=root)

    def read_rows(self) -> "Table":
        """Open the rows."""
        raise NotImplementedError

    def federate(self, table: "Table", seed: int) -> "Federation":
        """Cut the rows into clients by the table's columns; see `federate_by_column`."""
        from fedvlm_jax.data.partitioning.table_clients import federate_by_column

        return federate_by_column(table, self, seed)


@dataclass(frozen=True)
class FormOptions(RowOptions):
    """Data of one's own"""

    form: Form = ""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="OURS=THEIRS ...")] = ()
    """Columns of other names, as image=photo question=prompt chosen=answer."""
    question: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: as the rows say)")] = ""
    """Question of the rows that have none."""
    client_folder: Annotated[
        int | None, tyro.conf.arg(metavar="LEVEL", help_behavior_hint="(default: a column, or a partition)")
    ] = None
    """Clients are folders in the pictures' paths: 1 is a path's first folder, -1 the one that the picture is in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = self.reading.columns
        for pair, given in zip(pairs, self.columns, strict=True):
            if not all(pair):
                raise UserError(f"--data.columns has {given!r}; expected OURS=THEIRS, as in image=photo")
        check_names("--data.columns", tuple(ours for ours, _ in pairs))
        if self.client_folder == 0:
            raise UserError("--data.client-folder is 0: it must be 1 for the first folder of a path, 2, … or -1, -2, …")

    @property
    def reading(self) -> Reading:
        """Return how the records become rows."""
        pairs = (given.partition("=") for given in self.columns)
        columns = tuple((ours.strip(), theirs.strip()) for ours, _, theirs in pairs)
        return Reading(columns, self.question, client_folder=self.client_folder)

    @property
    def where(self) -> Path:
        """Return the path that the source names.

        Raises:
            UserError: there is nothing.
        """
        from fedvlm_jax.data.sources.registry import list_sets

        path = Path(self.source).expanduser()
        if not os.path.exists(path):  # noqa: PTH110  it raises for no name
            raise UserError(
                f"--data {self.source!r} is neither a named data set nor a path that exists; named sets are "
                f"{', '.join(list_sets())}. {list_forms()}"
            )
        return path

    def read_rows(self) -> "Table":
        """Make the records rows, once, and open them."""
        from fedvlm_jax.data.records_to_arrow import read_content

        return read_content(self)

    def find_content(self) -> Content:
        """Find the files, without reading more of them than their digests take."""
        raise NotImplementedError

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a file's records one after the other; without `pictures` those that are embedded may be `LEFT_OUT`.

        Raises:
            UserError: the file is damaged, or none of this form.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TurnOptions(FormOptions):
    """Data of one's own whose rows may be conversations"""

    turns: Literal["last", "each"] = "last"
    """Answers of a conversation that are learnt: its last one, or each one, an example with what comes before it."""

    @property
    def reading(self) -> Reading:
        """Return how the records become rows."""
        return super().reading._replace(each=self.turns == "each")


def settle(record: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """Give a record the client and the split of its file, whatever it says itself, but for validation out of train.

    >>> settle({"split": "train"}, Part(Path("a.json"), "a.json", split="test", label="ann"))
    {'split': 'test', 'client': 'ann'}
    """
    validates = part.split == "train" and record.get("split") == "validation"
    return {**record, "split": "validation" if validates else part.split, "client": part.label}
