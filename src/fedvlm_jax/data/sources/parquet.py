"""Options of data in RLAIF-V's columns, which parquet files hold; `parquet_to_arrow.py` reads them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fedvlm_jax.data.config import DataOptions, Source, check_names
from fedvlm_jax.data.sources.registry import list_sets
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import Count, Share

if TYPE_CHECKING:
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table


@dataclass(frozen=True)
class Options(DataOptions):
    """Parquet in RLAIF-V's columns"""

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
        """Open the file or folder of shards, with the second folder for images."""
        root = self.image_root and self.image_root.expanduser()
        if root is not None and not root.is_dir():
            raise UserError(f"--data.image-root {root} is no folder; expected the one that holds the images.")
        return dataclasses.replace(self.read_shards(), image_root=root)

    def read_shards(self) -> "Table":
        """Open the file or folder of shards."""
        from fedvlm_jax.data.parquet_to_arrow import read_parquet

        path = Path(self.source).expanduser()
        if not path.exists():
            raise UserError(
                f"--data {self.source!r} is neither a named data set nor a path that exists; named sets are "
                f"{', '.join(list_sets())}; else give a parquet file or a folder of parquet files."
            )
        return read_parquet(path)

    def federate(self, table: "Table", seed: int) -> "Federation":
        """Cut the rows into clients by the table's columns; see `federate_by_column`."""
        from fedvlm_jax.data.partitioning.table_clients import federate_by_column

        return federate_by_column(table, self, seed)
