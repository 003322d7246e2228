"""Options of data in RLAIF-V's columns, which parquet files hold; `parquet_to_arrow.py` reads them.

Nothing heavy is imported here, because `fedvlm train --help` reads this file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.data.config import DataOptions, Source, check_names
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import Count, Share


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
