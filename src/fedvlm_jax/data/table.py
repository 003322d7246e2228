"""Rows of image, question and answer from parquet, in RLAIF-V's columns; nothing is loaded whole.

A file, or a folder of shards, goes once through `datasets` into an Arrow file in its on-disk cache and is
memory-mapped from there, so that a table of 14 GB costs address space and no memory. The network is never asked.
Columns are checked from the files' footers, before a single row is read.

Source of the schema: the card of openbmb/RLAIF-V-Dataset (arXiv 2405.17220); `client`, `split`, `language` and
`question_client` are this project's additions.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedvlm_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from fedvlm_jax.data.options import DataOptions

__all__ = ["NEEDED", "UNDERSTOOD", "BrokenImageError", "Table", "read_parquet", "read_table"]

NEEDED = ("image", "question", "chosen")
UNDERSTOOD = (
    *NEEDED,
    *("rejected", "ds_name", "origin_dataset", "origin_split", "idx", "image_path"),
    *("client", "split", "language", "question_client", "concept", "task", "group"),
)
"""Every column that some part of this package reads; others are kept but mean nothing here."""


class BrokenImageError(ValueError):
    """An image that is missing or cannot be decoded; the message is the reason, in a few words."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows on disk, addressed by number.

    Attributes:
        name: the data set's registered name, or the path that was given.
        data: the Arrow table behind it, memory-mapped or small.
        folder: where relative image paths begin.
        digests: image digests that were already computed, row -> digest; only `images.digest_rows` fills it.
    """

    name: str
    data: "pa.Table"
    folder: Path
    digests: dict[int, bytes] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.data.num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.data.column_names)

    def read_text(self, column: str, rows: "Sequence[int] | np.ndarray | None" = None) -> list[str | None]:
        """The texts of one column, for the given rows [N] or for all; numbers become text, nulls stay None.

        Raises:
            UserError: there is no such column.
        """
        if column not in self.columns:
            raise UserError(f"{self.name} has no column {column!r}; it has: {', '.join(self.columns)}.")
        values = self.data.column(column)
        if rows is not None:
            values = values.take(np.asarray(rows, np.int64))
        return [text for chunk in values.chunks for text in _list_texts(chunk)]

    def read_image(self, row: int) -> bytes:
        """The encoded bytes of one row's image, from the table or from the file it names.

        Raises:
            BrokenImageError: there are none.
        """
        value = self.data.column("image")[int(row)].as_py()
        value = value if isinstance(value, dict) else {"path": value}
        if value.get("bytes"):
            return value["bytes"]
        if not value.get("path"):
            raise BrokenImageError("no image")
        try:
            found = (self.folder / value["path"]).read_bytes()
        except (OSError, ValueError) as error:
            raise BrokenImageError("image file cannot be read") from error
        if not found:
            raise BrokenImageError("no image")
        return found


def read_table(source: "str | DataOptions") -> Table:
    """Open a named data set, a parquet file, or a folder of parquet shards.

    Args:
        source: a name that `registry.find_sets` knows, or a path; or the options that hold it, which also say where a
            set lies that does not ship. A name wins over a path; `./name` is always a path.

    Raises:
        UserError: neither such a name nor such a path, or the files do not hold what is needed.
    """
    from fedvlm_jax.data.options import DataOptions
    from fedvlm_jax.data.registry import find_sets

    options = DataOptions(source=source) if isinstance(source, str) else source
    known = find_sets()
    if options.source in known:
        return known[options.source].read(options)
    path = Path(options.source).expanduser()
    if not path.exists():
        raise UserError(
            f"--data {options.source!r} is neither a named data set nor a path that exists; named sets are "
            f"{', '.join(sorted(known))}; else give a parquet file or a folder of parquet files."
        )
    return read_parquet(path)


def read_parquet(path: Path, name: str | None = None) -> Table:
    """Memory-map a parquet file or all `*.parquet` below a folder, in the order of their names.

    Raises:
        UserError: no parquet there, a file that is none, missing or mistyped columns, shards that disagree, no rows.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"the folder {path} has no *.parquet file; --data wants a parquet file or a folder of them.")
    columns, filled = _check_files(files)
    if not filled:
        raise UserError(f"{path} has no rows; expected at least one image with question and answer.")
    data = _map_files(filled, columns)
    return Table(name or str(path), data, path if path.is_dir() else path.parent)


def _check_files(files: Sequence[Path]) -> tuple[dict[str, "pa.DataType"], list[Path]]:
    """Read every footer; return the columns that all files share, typed as in the first, and the files with rows."""
    import pyarrow.parquet as pq

    schemas: list[dict[str, pa.DataType]] = []
    filled: list[Path] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                schema, count = opened.schema_arrow, opened.metadata.num_rows
        except Exception as error:  # pyarrow raises a dozen kinds for a file that is no parquet
            raise UserError(f"{file} cannot be read as parquet ({error}); replace it or remove it.") from error
        schemas.append({entry.name: entry.type for entry in schema})
        filled += [file] * (count > 0)
        missing = [column for column in NEEDED if column not in schemas[-1]]
        if missing:
            raise UserError(
                f"{file} lacks {_quote(missing)}; it has {_quote(schemas[-1])}. Needed are {_quote(NEEDED)} "
                f"(RLAIF-V's schema); understood as well: {_quote(UNDERSTOOD[len(NEEDED) :])}."
            )
        for column, kind in schemas[-1].items():
            _check_type(file, column, kind)
        differing = [c for c in UNDERSTOOD if (c in schemas[-1]) != (c in schemas[0])]
        if differing:
            raise UserError(
                f"{file} and {files[0]} disagree: only one of them has {_quote(differing)}. All shards of a folder "
                "need the same columns; give one of them alone, or add the columns."
            )
    common = set.intersection(*(set(schema) for schema in schemas))
    return {column: kind for column, kind in schemas[0].items() if column in common}, filled


def _check_type(file: Path, column: str, kind: "pa.DataType") -> None:
    import pyarrow.types as is_a

    if is_a.is_dictionary(kind):
        kind = kind.value_type
    if column == "image":
        parts = {kind.field(i).name for i in range(kind.num_fields)} if is_a.is_struct(kind) else set()
        good = parts & {"bytes", "path"} or is_a.is_string(kind) or is_a.is_large_string(kind)
        if not (good or is_a.is_binary(kind) or is_a.is_large_binary(kind)):
            raise UserError(
                f"{file}: column 'image' is {kind}; expected a struct of bytes and path (as `datasets.Image` writes "
                "it), the encoded bytes, or a path."
            )
    elif column in UNDERSTOOD and not (
        is_a.is_string(kind) or is_a.is_large_string(kind) or is_a.is_integer(kind) or is_a.is_null(kind)
    ):
        raise UserError(f"{file}: column {column!r} is {kind}; expected text.")


def _map_files(files: Sequence[Path], columns: dict[str, "pa.DataType"]) -> "pa.Table":
    """Let `datasets` write the shards into its cache as Arrow (once per content) and memory-map the result."""
    import datasets
    import datasets.config
    import datasets.exceptions
    import pyarrow as pa

    features = datasets.Features.from_arrow_schema(pa.schema(list(columns.items())))
    features["image"] = datasets.Image(decode=False)
    for column in UNDERSTOOD[1:]:
        if column in features:
            features[column] = datasets.Value("string")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or datasets.config.HF_DATASETS_CACHE) / "fedvlm-jax"
    try:
        with _hushed():
            dataset = datasets.Dataset.from_parquet(
                [str(file.resolve()) for file in files],
                cache_dir=str(cache),
                columns=list(columns),
                features=features,
                keep_in_memory=False,
            )
    except PermissionError as error:
        raise UserError(f"the cache {cache} cannot be written; set HF_DATASETS_CACHE to a folder that can.") from error
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        where = str(files[0]) if len(files) == 1 else f"one of the {len(files)} files in {files[0].parent}"
        raise UserError(
            f"{where} cannot be read to its end ({type(cause).__name__}: {cause}); it is damaged or its shards' "
            "types differ. Write it again, or remove it from the folder."
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    return dataset.data.table


def _list_texts(chunk: "pa.Array") -> list[str | None]:
    """An array's values as text; a dictionary's words are made once, not once per row."""
    import pyarrow.types as is_a

    if not is_a.is_dictionary(chunk.type):
        return [None if value is None else str(value) for value in chunk.to_pylist()]
    words = [*_list_texts(chunk.dictionary), None]
    return [words[code] for code in chunk.indices.fill_null(len(words) - 1).tolist()]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep `datasets` from drawing bars and from logging the errors that are raised anyway."""
    import datasets

    logger, bars = logging.getLogger("datasets"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _quote(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
