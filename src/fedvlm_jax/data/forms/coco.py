"""COCO's captions: JSON with `images` and `annotations`; all captions of a picture are its gold answers."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedvlm_jax.data.forms.base import Form, FormOptions
from fedvlm_jax.records.files import Content, Part, Record, find_files
from fedvlm_jax.records.text_files import read_coco


@dataclass(frozen=True)
class Options(FormOptions):
    """COCO captions"""

    form: Form = "coco"
    question: str = "Describe the picture."
    """Question that is asked about every picture."""

    def find_content(self) -> Content:
        """Find the JSON files in the folder."""
        return find_files(self.where, (".json",))

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a file's pictures, each with its captions."""
        return read_coco(part.file)
