"""RLAIF-V: 83,132 questions about pictures, each with a preferred and a rejected answer (arXiv 2405.17220).

The set that FedVLM was tried on: openbmb/RLAIF-V-Dataset on the Hugging Face hub, parquet shards of about 14 GB under
CC BY-NC 4.0. It does not ship: it is read from a folder of its shards (`--data.path`), or fetched by `datasets` and
kept in its cache. Its natural clients are its sources (`origin_dataset`); it is split here, by image content.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fedvlm_jax.data.config import Source
from fedvlm_jax.data.forms import parquet
from fedvlm_jax.data.forms.base import RowOptions
from fedvlm_jax.data.forms.hub import fetch, find_commit
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.utils.digests import digest_files

if TYPE_CHECKING:
    from fedvlm_jax.data.table import Table

NAME, HUB_ID = "rlaif-v", "openbmb/RLAIF-V-Dataset"


@dataclass(frozen=True)
class Options(RowOptions):
    """RLAIF-V"""

    source: Source = NAME
    path: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the Hugging Face hub)")] = (
        None
    )
    """Folder of the downloaded parquet shards."""
    revision: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: what the hub calls main now)")
    ] = None
    """Commit, branch or tag of the hub; older ones are smaller, so name one for figures that last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None and self.revision is not None:
            raise UserError(f"--data.revision {self.revision} is the hub's; with --data.path {self.path} leave it out.")

    def read_rows(self) -> "Table":
        """Open the shards below `path`, or the hub's at `revision` (what it calls main now, if None)."""
        path = self.path and self.path.expanduser()
        if path is not None and not path.exists():
            raise UserError(f"--data.path {path} does not exist; expected the folder of RLAIF-V's parquet shards.")
        table = _fetch(self.revision) if path is None else parquet.Options(source=str(path)).read_rows()
        # Other data of the same form lack these columns.
        if missing := [c for c in ("rejected", "origin_dataset", "origin_split", "idx") if c not in table.columns]:
            raise UserError(
                f"--data.path {self.path} is not RLAIF-V: it lacks {', '.join(missing)} and has "
                f"{', '.join(table.columns)}. For other data of that form: --data {self.path}"
            )
        return dataclasses.replace(table, name=NAME, form="")


def _fetch(revision: str | None) -> "Table":
    from fedvlm_jax.data.arrow_cache import open_dataset

    try:
        dataset = fetch(HUB_ID, split="train", revision=revision)
    except Exception as error:  # of the hub, the network or the disk: their libraries share no base
        command = f"hf download {HUB_ID} --repo-type dataset{f' --revision {revision}' if revision else ''}"
        raise UserError(
            f"--data {NAME}: {HUB_ID} at revision {revision or 'main'} cannot be fetched ({explain_error(error)}). "
            f"Where the hub can be reached, run: {command} --local-dir DIR; then give --data.path DIR."
        ) from error
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    # Its folder is not the working folder, a file of which could pass for one of the set's images.
    table, revision = open_dataset(dataset), find_commit(dataset) or revision
    return dataclasses.replace(table, name=NAME, revision=revision, digest=digest_files(files))
