"""Parquet files and folders of shards: RLAIF-V's columns, others by `--data.columns`, messages, conversations."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedvlm_jax.data.forms.base import Form, TurnOptions
from fedvlm_jax.records.files import Content, Part, Record, find_files


@dataclass(frozen=True)
class Options(TurnOptions):
    """Parquet files"""

    form: Form = "parquet"

    def find_content(self) -> Content:
        """Find all `*.parquet` below the folder, and check their footers."""
        from fedvlm_jax.data.parquet_columns import check_shards

        content = find_files(self.where, (".parquet",), below=True)
        check_shards([part.file for part in content.parts], plain=not self.columns)
        return content

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Read a shard's rows."""
        from fedvlm_jax.records.arrow_files import read_parquet

        return read_parquet(part.file, pictures)
