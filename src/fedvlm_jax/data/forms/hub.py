"""Data sets of the Hugging Face hub, by their id `owner/name`: fetched by `datasets`, and kept in its cache."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fedvlm_jax.data.forms.base import Form, TurnOptions
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.records.detection import HUB_ID
from fedvlm_jax.records.files import Content, Part, Record, spread_splits
from fedvlm_jax.utils.digests import digest_files

if TYPE_CHECKING:
    from fedvlm_jax.data.table import Table


@dataclass(frozen=True)
class Options(TurnOptions):
    """A data set of the Hugging Face hub"""

    form: Form = "hub"
    config: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: its only one)")] = None
    """Configuration of the data set, where it has several."""
    revision: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: what the hub calls main now)")
    ] = None
    """Commit, branch or tag of the hub; name one for figures that last."""
    splits: tuple[str, ...] = ()
    """Use only these splits; by default all, which then are to be train, validation and test."""

    def read_rows(self) -> "Table":
        """Make the rows a table; pictures that came in archives lie in the cache of `datasets`."""
        from datasets import config

        extracted = Path(config.EXTRACTED_DATASETS_PATH)
        return dataclasses.replace(super().read_rows(), image_root=extracted if extracted.is_dir() else None)

    def find_content(self) -> Content:
        """Fetch the data set, and find the Arrow files in which `datasets` keeps it."""
        from huggingface_hub import constants

        if not HUB_ID.fullmatch(self.source) or Path(self.source).exists():  # `datasets` would read the path
            raise UserError(f"--data {self.source} is a path, or no owner/name of the hub: leave out --data.form hub")
        try:
            found = fetch(self.source, name=self.config, revision=self.revision)
        except Exception as error:  # of the hub, the network or the disk: their libraries share no base
            raise UserError(
                f"--data {self.source} is no path that exists, and as a data set of the Hugging Face hub it cannot be "
                f"fetched ({explain_error(error)}). Check the name, --data.config and --data.revision; or, where the "
                f"hub can be reached: hf download {self.source} --repo-type dataset --local-dir DIR; then --data DIR"
            ) from error
        if unknown := [name for name in self.splits if name not in found]:
            raise UserError(f"--data.splits has {unknown[0]}; {self.source} has {', '.join(found)}")
        files = [(name, Path(e["filename"])) for name in self.splits or found for e in found[name].cache_files]
        splits = spread_splits([name for name, _ in files])
        parts = tuple(Part(file, name, split=split) for (name, file), split in zip(files, splits, strict=True))
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{self.source.replace('/', '--')}"
        revision = next(filter(None, map(find_commit, found.values())), self.revision)
        return Content(folder, parts, digest_files(file for _, file in files), revision)

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read an Arrow file's rows."""
        from fedvlm_jax.records.arrow_files import read_arrow

        return read_arrow(part.file, pictures)


def fetch(hub_id: str, **asked: Any) -> Any:
    """Fetch a data set, or a split of it, with `datasets`, which runs no code of the hub's."""
    import datasets

    return datasets.load_dataset(hub_id, **asked)


def find_commit(dataset: Any) -> str | None:
    """Find the commit that a data set was fetched at, in the addresses of its files."""
    urls = dataset.info.download_checksums or {}  # hf://datasets/owner/name@commit/file
    return min((found[1] for url in urls if (found := re.search(r"@([0-9a-f]{40})/", url))), default=None)
