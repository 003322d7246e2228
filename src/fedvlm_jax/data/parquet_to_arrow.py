"""Parquet files and folders of shards in RLAIF-V's columns, made Arrow once (`arrow_cache.py`).

Columns are checked from the files' footers (`parquet_columns.py`), before a single row is read.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedvlm_jax.data.arrow_cache import open_cached
from fedvlm_jax.data.parquet_columns import TEXTS, UNDERSTOOD, check_shards, is_list, make_plain
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.utils.cache_folders import read_bound
from fedvlm_jax.utils.digests import digest_files

if TYPE_CHECKING:
    import datasets  # takes a second to import

Columns = dict[str, pa.DataType]


def read_parquet(path: Path, name: str | None = None) -> Table:
    """Memory-map a parquet file or all `*.parquet` below a folder, in the order of their names; refuse what is none.

    Raises:
        UserError: no parquet there, a file that is none, missing or mistyped columns, shards that disagree, no rows.
    """
    # A folder may be called *.parquet: what is in it is found by itself. A link to nowhere stays, and is refused.
    files = sorted(file for file in path.rglob("*.parquet") if not file.is_dir()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"the folder {path} has no *.parquet file; --data wants a parquet file or a folder of them.")
    columns, filled = check_shards(files)
    if not filled:
        raise UserError(f"{path} has no rows; expected at least one image with question and answer.")
    digest = digest_files(filled)
    read_bound()  # a wrong value in the environment is refused before anything is done
    make_builder, features = _prepare(filled, columns)
    table = open_cached(digest, repr(features), make_builder, lambda error: _explain(filled, columns, error))
    if digest_files(filled) != digest:
        raise UserError(f"{path} was changed while it was read; try again when nobody writes it.")
    folder = path if path.is_dir() else path.parent
    return dataclasses.replace(table, name=name or str(path), folder=folder, digest=digest)


def _make_features(columns: Columns) -> "datasets.Features":
    """Describe to `datasets` what it is to write: understood columns as text, others as they are."""
    import datasets

    others = [(name, kind) for name, kind in columns.items() if name not in UNDERSTOOD]
    plain = pa.schema([(name, pa.string() if kind in TEXTS else kind) for name, kind in others])
    text = datasets.Value("string")
    known = dict(datasets.Features.from_arrow_schema(plain)) | {"image": datasets.Image(decode=False)}
    if is_list(columns["chosen"]):
        known["chosen"] = datasets.List(text)
    return datasets.Features({name: known.get(name, text) for name in columns})


def _prepare(files: Sequence[Path], columns: Columns) -> tuple[Any, "datasets.Features"]:
    """Return what makes a builder of these shards' Arrow files, and the features that it writes."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    class PlainParquet(Parquet):
        def _cast_table(self, pa_table: pa.Table) -> pa.Table:
            return super()._cast_table(make_plain(pa_table))

    features = _make_features(columns)

    def make_builder(**place: str) -> PlainParquet:
        return PlainParquet(
            data_files={"train": [str(file.resolve()) for file in files]},
            columns=list(columns),
            features=features,
            batch_size=1000,  # by default the first row group's rows, and 0 is refused
            **place,
        )

    return make_builder, features


def _explain(files: Sequence[Path], columns: Columns, error: Exception) -> UserError:
    broken = _find_damaged(files, list(columns))
    where = str(broken or (files[0] if len(files) == 1 else f"one of the {len(files)} files in {files[0].parent}"))
    return UserError(
        f"{where} cannot be read to its end ({explain_error(error.__cause__ or error)}); it is damaged or its "
        "columns are of types that cannot be. Write it again, or remove it from the folder."
    )


def _find_damaged(files: Sequence[Path], columns: list[str]) -> Path | None:
    """Find the first file that pyarrow itself cannot read through, or that cannot be made plain."""
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(columns=columns):
                    make_plain(pa.Table.from_batches([batch]))
        except Exception:  # of any kind, as in `check_shards`
            return file
    return None
