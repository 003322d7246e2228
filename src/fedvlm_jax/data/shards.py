"""Parquet shards in RLAIF-V's columns: checked by their footers, then written by `datasets` into its cache as Arrow.

Whatever is wrong with a file is one `UserError` that names it.
"""

import contextlib
import logging
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedvlm_jax.caches import Hold, find_arrow, hold_table, read_bound, trim
from fedvlm_jax.errors import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["NEEDED", "UNDERSTOOD", "check_shards", "convert_shards", "hush_datasets"]

NEEDED = ("image", "question", "chosen")
UNDERSTOOD = (
    *NEEDED,
    *("rejected", "ds_name", "origin_dataset", "origin_split", "idx", "image_path"),
    *("client", "split", "language", "question_client", "concept", "task", "group"),
)
"""Every column that some part of this package reads. Others mean nothing here, but rows can be told apart by them, so
they are kept where they are plain (text, numbers, truth) and of one type in all shards."""


def check_shards(files: Sequence[Path]) -> tuple[dict[str, "pa.DataType"], list[Path]]:
    """Read every footer; return the columns to be read, typed as in the first file, and the files with rows."""
    import pyarrow.parquet as pq

    schemas: list[dict[str, pa.DataType]] = []
    filled: list[Path] = []
    for file in files:
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no regular file; replace it or remove it.")
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
    kept = {
        column: kind
        for column, kind in schemas[0].items()
        if column in UNDERSTOOD or (_is_plain(kind) and all(schema.get(column) == kind for schema in schemas))
    }
    return kept, filled


def _check_type(file: Path, column: str, kind: "pa.DataType") -> None:
    import pyarrow.types as is_a

    if column == "image":
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if is_a.is_struct(kind) else {}
        encoded = parts.get("bytes", kind)
        binary = is_a.is_binary(encoded) or is_a.is_large_binary(encoded)
        if not (binary or is_a.is_string(kind) or is_a.is_large_string(kind) or ("path" in parts and encoded is kind)):
            raise UserError(
                f"{file}: column 'image' is {kind}; expected a struct of bytes and path (as `datasets.Image` writes "
                "it), the encoded bytes, or a path."
            )
        return
    kind = kind.value_type if is_a.is_dictionary(kind) else kind
    text = is_a.is_string(kind) or is_a.is_large_string(kind)
    if column in UNDERSTOOD and not (text or is_a.is_integer(kind) or is_a.is_null(kind)):
        raise UserError(f"{file}: column {column!r} is {kind}; expected text. Write it as text, or leave it out.")


def _is_plain(kind: "pa.DataType") -> bool:
    import pyarrow.types as is_a

    kind = kind.value_type if is_a.is_dictionary(kind) else kind
    text = is_a.is_string(kind) or is_a.is_large_string(kind)
    return text or is_a.is_integer(kind) or is_a.is_floating(kind) or is_a.is_boolean(kind)


def convert_shards(
    files: Sequence[Path], columns: dict[str, "pa.DataType"], digest: str
) -> tuple["datasets.Dataset", Hold | None]:
    """Let `datasets` write the shards into our cache as Arrow, once per content.

    `datasets` itself goes by names and time stamps, so every content has a folder of its own.

    Args:
        files, columns: what `check_shards` found.
        digest: of the files' contents.

    Returns:
        The data set, and what keeps its files from being removed.

    Raises:
        UserError: a shard is damaged, the cache cannot be written or its bound is none.
    """
    import datasets
    import datasets.exceptions
    import pyarrow as pa

    features = datasets.Features.from_arrow_schema(pa.schema(list(columns.items())))
    features["image"] = datasets.Image(decode=False)
    for column in UNDERSTOOD[1:]:
        if column in features:
            features[column] = datasets.Value("string")
    cache, bound = find_arrow(), read_bound()
    try:
        writing = Hold(cache)
        with hush_datasets():
            dataset = datasets.Dataset.from_parquet(
                [str(file.resolve()) for file in files],
                cache_dir=str(cache / digest),
                columns=list(columns),
                features=features,
                keep_in_memory=False,
            )
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        broken = _find_damaged(files, list(columns))
        where = str(broken or (files[0] if len(files) == 1 else f"one of the {len(files)} files in {files[0].parent}"))
        raise UserError(
            f"{where} cannot be read to its end ({type(cause).__name__}: {cause}); it is damaged or its columns are of "
            "types that cannot be. Write it again, or remove it from the folder."
        ) from error
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be written ({error.strerror or error}); set FEDVLM_CACHE to a folder with "
            "room for a copy of the data."
        ) from error
    pa.default_memory_pool().release_unused()  # the pool would hold on to the largest row group
    assert isinstance(dataset, datasets.Dataset)
    hold = hold_table(Path(dataset.cache_files[0]["filename"]).parent)
    writing.let_go()
    trim(bound)
    return dataset, hold


def _find_damaged(files: Sequence[Path], columns: list[str]) -> Path | None:
    """The first file that pyarrow itself cannot read through."""
    import pyarrow.parquet as pq

    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for _ in opened.iter_batches(columns=columns):
                    pass
        except Exception:  # see above
            return file
    return None


@contextlib.contextmanager
def hush_datasets() -> Generator[None]:
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
