"""JSON: lines of objects, or a list of them; with columns, TRL's messages, or LLaVA's conversations."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedvlm_jax.data.forms.base import Form, TurnOptions
from fedvlm_jax.records.files import Content, Part, Record, find_files
from fedvlm_jax.records.text_files import read_json


@dataclass(frozen=True)
class Options(TurnOptions):
    """JSON lines, or a list in JSON"""

    form: Form = "json"

    def find_content(self) -> Content:
        """Find the files of lines in the folder, or else those of lists."""
        return find_files(self.where, (".jsonl", ".ndjson"), (".json",))

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a file's objects."""
        return read_json(part.file)
