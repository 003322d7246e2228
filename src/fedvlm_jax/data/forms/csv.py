"""Tables as text: commas, semicolons or tabs between the cells, and the columns' names in the first row."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedvlm_jax.data.forms.base import Form, FormOptions
from fedvlm_jax.records.files import Content, Part, Record, find_files
from fedvlm_jax.records.text_files import read_csv


@dataclass(frozen=True)
class Options(FormOptions):
    """CSV or TSV"""

    form: Form = "csv"

    def find_content(self) -> Content:
        """Find the tables in the folder."""
        return find_files(self.where, (".csv", ".tsv"))

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a table's rows."""
        return read_csv(part.file)
