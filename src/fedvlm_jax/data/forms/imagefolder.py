"""Folders of pictures, which `datasets` calls imagefolder: with metadata, or with a folder for every class."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedvlm_jax.data.forms.base import Form, TurnOptions
from fedvlm_jax.records.files import Content, Part, Record, find_pictures, list_classes
from fedvlm_jax.records.text_files import read_csv, read_json


@dataclass(frozen=True)
class Options(TurnOptions):
    """A folder of pictures"""

    form: Form = "imagefolder"
    question: str = "What is in the picture?"
    """Question of the rows that have none; of all, where a folder's name is the answer."""

    def find_content(self) -> Content:
        """Find the metadata, or else the pictures."""
        return find_pictures(self.where)

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read the rows of metadata, or list the pictures in folders of classes."""
        if part.file.suffix == ".parquet":
            from fedvlm_jax.records.arrow_files import read_parquet

            return read_parquet(part.file, pictures)
        read = list_classes if part.file.is_dir() else read_csv if part.file.suffix == ".csv" else read_json
        return read(part.file)
