"""Folders that `datasets` wrote by `save_to_disk`, of a `Dataset` or of a `DatasetDict`, whose keys are the splits."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedvlm_jax.data.forms.base import Form, TurnOptions
from fedvlm_jax.records.files import Content, Part, Record, find_saved


@dataclass(frozen=True)
class Options(TurnOptions):
    """A folder of datasets.save_to_disk"""

    form: Form = "saved"

    def find_content(self) -> Content:
        """Find the Arrow files that the folder lists."""
        return find_saved(self.where)

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read an Arrow file's rows."""
        from fedvlm_jax.records.arrow_files import read_arrow

        return read_arrow(part.file, pictures)
