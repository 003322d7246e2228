"""Parquet shards in RLAIF-V's columns: checked by their footers, then written by `datasets` into its cache as Arrow.

Whatever is wrong with a file is one `UserError` that names it.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedvlm_jax.errors import UserError, explain_error, find_machine_fault
from fedvlm_jax.utils.cache_folders import Hold, find_arrow, hold_table, read_bound, trim
from fedvlm_jax.utils.digests import digest_parts

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["NEEDED", "UNDERSTOOD", "check_shards", "convert_shards", "find_folder", "hush_datasets"]

NEEDED = ("image", "question", "chosen")
BATCH = 1000
"""Rows that are converted at a time."""

UNDERSTOOD = (
    *NEEDED,
    *("rejected", "ds_name", "origin_dataset", "origin_split", "idx", "image_path"),
    *("client", "split", "language", "question_client", "concept", "task", "group"),
)
"""Every column that some part of this package reads. Others mean nothing here, but rows can be told apart by them, so
they are kept where they are plain (text, numbers, truth) and of one type in all shards."""


def check_shards(files: Sequence[Path]) -> tuple[dict[str, "pa.DataType"], list[Path]]:
    """Read every footer; return the columns to be read, typed as in the first file, and the files with rows.

    Columns of classes with names count as text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fedvlm_jax.data.arrow_types import read_class_names

    schemas: list[dict[str, pa.DataType]] = []
    filled: list[Path] = []
    labels: list[frozenset[str]] = []
    for file in files:
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no regular file; replace it or remove it.")
        try:
            with pq.ParquetFile(file) as opened:
                schema, count = opened.schema_arrow, opened.metadata.num_rows
                groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        except Exception as error:  # pyarrow raises a dozen kinds for a file that is no parquet
            raise UserError(
                f"{file} cannot be read as parquet ({explain_error(error)}); replace it or remove it."
            ) from error
        if min(groups, default=0) < 0 or sum(groups) != count:
            raise UserError(f"{file} promises {count} rows and has {sum(groups)}: it is damaged; write it again.")
        labels.append(frozenset(read_class_names(schema)))
        schemas.append({entry.name: pa.string() if entry.name in labels[-1] else entry.type for entry in schema})
        filled += [file] * (count > 0)
        _check_columns(file, schema.names)
        for column, kind in schemas[-1].items():
            _check_type(file, column, kind)
        _check_agreement((files[0], schemas[0], labels[0]), (file, schemas[-1], labels[-1]))
    kept = {
        column: kind
        for column, kind in schemas[0].items()
        if column in UNDERSTOOD or (_is_plain(kind) and all(schema.get(column) == kind for schema in schemas))
    }
    return kept, filled


def _check_columns(file: Path, names: Sequence[str]) -> None:
    missing = [column for column in NEEDED if column not in names]
    if missing:
        raise UserError(
            f"{file} lacks {_quote(missing)}; it has {_quote(dict.fromkeys(names))}. Needed are {_quote(NEEDED)} "
            f"(RLAIF-V's schema); understood as well: {_quote(UNDERSTOOD[len(NEEDED) :])}."
        )
    twice = [column for column, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{file} has more than one column {_quote(twice)}; keep the one that is meant.")


def _check_agreement(
    first: tuple[Path, dict[str, "pa.DataType"], frozenset[str]],
    other: tuple[Path, dict[str, "pa.DataType"], frozenset[str]],
) -> None:
    """Shards must have the same columns, and the same of them as classes: else names stand beside numbers."""
    differing = [c for c in UNDERSTOOD if (c in first[1]) != (c in other[1])]
    if differing:
        raise UserError(
            f"{other[0]} and {first[0]} disagree: only one of them has {_quote(differing)}. All shards of a folder "
            "need the same columns; give one of them alone, or add the columns."
        )
    named = [c for c in UNDERSTOOD if (c in first[2]) != (c in other[2])]
    numbers = [c for c in named if not _is_text((first if c in other[2] else other)[1][c])]
    if numbers:
        raise UserError(
            f"{other[0]} and {first[0]} disagree: only one of them has names for the classes of {_quote(numbers)}. "
            "Write both with `datasets`, or write the names as text."
        )


def _check_type(file: Path, column: str, kind: "pa.DataType") -> None:
    import pyarrow.types as is_a

    from fedvlm_jax.data.arrow_types import find_item, is_list

    if column == "image":
        if not _is_image(kind):
            raise UserError(
                f"{file}: column 'image' is {kind}; expected a struct of bytes and path (as `datasets.Image` writes "
                "it), the encoded bytes, or a path; or a list with one of these in every row."
            )
        return
    if column not in UNDERSTOOD:
        return
    if column == "chosen" and is_list(kind) and _is_text(find_item(kind)):
        return
    plain = kind.value_type if is_a.is_dictionary(kind) else kind
    if not (_is_text(plain) or is_a.is_integer(plain) or is_a.is_null(plain)):
        several = ", a list of texts, or of structs with a text 'answer'" if column == "chosen" else ""
        mend = "Write it as text." if column in NEEDED else "Write it as text, or leave it out."
        raise UserError(f"{file}: column {column!r} is {kind}; expected text{several}. {mend}")


def _is_image(kind: "pa.DataType") -> bool:
    import pyarrow.types as is_a

    from fedvlm_jax.data.arrow_types import is_list

    kind = kind.value_type if is_list(kind) else kind
    kind = kind.value_type if is_a.is_dictionary(kind) else kind
    if not is_a.is_struct(kind):
        return _is_binary(kind) or _is_text(kind)
    parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    if "bytes" in parts:
        return _is_binary(parts["bytes"]) or (is_a.is_null(parts["bytes"]) and "path" in parts)
    return "path" in parts


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow.types as is_a

    return is_a.is_binary(kind) or is_a.is_large_binary(kind) or is_a.is_binary_view(kind)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as is_a

    return is_a.is_string(kind) or is_a.is_large_string(kind) or is_a.is_string_view(kind)


def _is_plain(kind: "pa.DataType") -> bool:
    import pyarrow.types as is_a

    kind = kind.value_type if is_a.is_dictionary(kind) else kind
    return _is_text(kind) or is_a.is_integer(kind) or is_a.is_floating(kind) or is_a.is_boolean(kind)


def find_folder(columns: dict[str, "pa.DataType"], digest: str) -> Path:
    """The folder of our cache for files of this content, read as these columns; see `convert_shards`."""
    return find_arrow() / digest / "rows" / digest_parts([repr(_make_features(columns)).encode()]).hex()


def _make_features(columns: dict[str, "pa.DataType"]) -> "datasets.Features":
    """What `datasets` is to write: what is understood as text, other columns as they are."""
    import datasets
    import pyarrow as pa

    from fedvlm_jax.data.arrow_types import is_list

    others = [(name, kind) for name, kind in columns.items() if name not in UNDERSTOOD]
    plain = pa.schema([(name, pa.string() if _is_text(kind) else kind) for name, kind in others])
    text = datasets.Value("string")
    known = dict(datasets.Features.from_arrow_schema(plain)) | {"image": datasets.Image(decode=False)}
    if is_list(columns["chosen"]):
        known["chosen"] = datasets.List(text)
    return datasets.Features({name: known.get(name, text) for name in columns})


def convert_shards(
    files: Sequence[Path], columns: dict[str, "pa.DataType"], digest: str
) -> tuple["datasets.Dataset", Hold | None]:
    """Let `datasets` write the shards into our cache as Arrow, once per content.

    `datasets` itself goes by names and time stamps, so it is told the folder, which the content decides: files that
    were touched, moved or copied are not converted again.

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

    from fedvlm_jax.data.arrow_types import make_builder

    cache, folder, bound = find_arrow(), find_folder(columns, digest), read_bound()
    writing: Hold | None = None
    try:
        writing = Hold(cache)
        with hush_datasets():
            builder = make_builder(
                data_files={"train": [str(file.resolve()) for file in files]},
                cache_dir=str(folder.parent.parent),
                dataset_name=folder.parent.name,
                config_id=folder.name,
                columns=list(columns),
                features=_make_features(columns),
                batch_size=BATCH,  # by default the first row group's rows, and 0 is refused
            )
            builder.download_and_prepare()
            dataset = builder.as_dataset(split="train")
        assert isinstance(dataset, datasets.Dataset)
        hold = hold_table(Path(dataset.cache_files[0]["filename"]).parent)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError) as error:
        fault = find_machine_fault(error)
        if isinstance(fault, OSError):
            raise _refuse_cache(cache, fault) from error
        if fault is not None:
            raise fault from None
        cause = error.__cause__ or error
        broken = _find_damaged(files, list(columns))
        where = str(broken or (files[0] if len(files) == 1 else f"one of the {len(files)} files in {files[0].parent}"))
        raise UserError(
            f"{where} cannot be read to its end ({explain_error(cause)}); it is damaged or its columns are of "
            "types that cannot be. Write it again, or remove it from the folder."
        ) from error
    except OSError as error:
        raise _refuse_cache(cache, error) from error
    finally:
        if writing is not None:
            writing.let_go()
    pa.default_memory_pool().release_unused()  # the pool would hold on to the largest row group
    trim(bound)
    return dataset, hold


def _refuse_cache(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache {cache} cannot be written ({error.strerror or error}); set FEDVLM_CACHE to a folder with room for "
        "a copy of the data."
    )


def _find_damaged(files: Sequence[Path], columns: list[str]) -> Path | None:
    """The first file that pyarrow itself cannot read through, or that cannot be made plain."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fedvlm_jax.data.arrow_types import make_plain

    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(columns=columns):
                    make_plain(pa.Table.from_batches([batch]))
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
