"""Parquet files and folders of shards, written once by `datasets` into the cache as Arrow and mapped from there.

The Arrow files are as large again as the shards; in memory there are a few row groups at a time. The network is never
asked. Columns are checked from the files' footers (`parquet_columns.py`), before a single row is read.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from fedvlm_jax.data.arrow_files import check_seal, discard, open_arrow
from fedvlm_jax.data.image_index import ImageFacts
from fedvlm_jax.data.parquet_columns import UNDERSTOOD, check_shards, is_list, is_text, make_plain
from fedvlm_jax.data.table import FACTS, Table
from fedvlm_jax.errors import UserError, explain_error, find_machine_fault
from fedvlm_jax.utils.cache_folders import Hold, find_arrow, hold_table, read_bound, trim
from fedvlm_jax.utils.digests import digest_files, digest_parts

if TYPE_CHECKING:
    import datasets  # takes a second to import


def read_parquet(path: Path, name: str | None = None) -> Table:
    """Memory-map a parquet file or all `*.parquet` below a folder, in the order of their names.

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
    table = _open_cached(filled, columns, digest)
    if digest_files(filled) != digest:
        raise UserError(f"{path} was changed while it was read; try again when nobody writes it.")
    return dataclasses.replace(table, name=name or str(path), folder=path if path.is_dir() else path.parent)


def _open_cached(files: list[Path], columns: dict[str, pa.DataType], digest: str) -> Table:
    """Open the Arrow files of these shards; where they are damaged they are written again, once."""
    kept, table = _find_folder(columns, digest), None
    if kept.is_dir():
        try:
            table = _open_sealed(files, columns, digest)
        except Exception as error:  # whatever is wrong with the Arrow files, the shards are there
            if find_machine_fault(error):
                raise
        if table is None:
            discard(kept)
    if table is None:
        table = _open_sealed(files, columns, digest)
    if table is None:
        raise UserError(f"{kept} is not what was just written there: its disk is damaged; set FEDVLM_CACHE to another")
    return table


def _open_sealed(files: list[Path], columns: dict[str, pa.DataType], digest: str) -> Table | None:
    """Convert shards and open the result; None where that does not fit its seal."""
    dataset, hold = convert_shards(files, columns, digest)
    sealed = False
    try:
        table = open_dataset(dataset, "", files[0].parent)
        assert table.locations is not None
        sealed = check_seal(table.data, table.locations)
    finally:
        if not sealed and hold is not None:
            hold.let_go()
    return dataclasses.replace(table, hold=hold, digest=digest) if sealed else None


def open_dataset(dataset: "datasets.Dataset", name: str, folder: Path) -> Table:
    """Map the Arrow files of a data set that `datasets` has in its cache, whose column `image` is not decoded."""
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    data, locations = open_arrow(files)
    return Table(name, data, folder, locations, ImageFacts.open(files[0].parent / FACTS))


def _find_folder(columns: dict[str, pa.DataType], digest: str) -> Path:
    """Return the folder of the cache for files of this content, read as these columns."""
    return find_arrow() / digest / "rows" / digest_parts([repr(_make_features(columns)).encode()]).hex()


def _make_features(columns: dict[str, pa.DataType]) -> "datasets.Features":
    """Describe to `datasets` what it is to write: understood columns as text, others as they are."""
    import datasets

    others = [(name, kind) for name, kind in columns.items() if name not in UNDERSTOOD]
    plain = pa.schema([(name, pa.string() if is_text(kind) else kind) for name, kind in others])
    text = datasets.Value("string")
    known = dict(datasets.Features.from_arrow_schema(plain)) | {"image": datasets.Image(decode=False)}
    if is_list(columns["chosen"]):
        known["chosen"] = datasets.List(text)
    return datasets.Features({name: known.get(name, text) for name in columns})


def convert_shards(
    files: Sequence[Path], columns: dict[str, pa.DataType], digest: str
) -> tuple["datasets.Dataset", Hold | None]:
    """Let `datasets` write the shards into the cache as Arrow, once per content.

    Returns:
        The data set, and the hold that keeps its files from being removed.

    Raises:
        UserError: a shard is damaged, the cache cannot be written or its bound is none.
    """
    import datasets.exceptions

    cache, bound = find_arrow(), read_bound()
    writing: Hold | None = None
    try:
        writing = Hold(cache)
        dataset = _write_arrow(files, columns, _find_folder(columns, digest))
        hold = hold_table(Path(dataset.cache_files[0]["filename"]).parent)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError) as error:
        fault = find_machine_fault(error)
        if isinstance(fault, OSError):
            raise _refuse_cache(cache, fault) from error
        if fault is not None:
            raise fault from None
        broken = _find_damaged(files, list(columns))
        where = str(broken or (files[0] if len(files) == 1 else f"one of the {len(files)} files in {files[0].parent}"))
        raise UserError(
            f"{where} cannot be read to its end ({explain_error(error.__cause__ or error)}); it is damaged or its "
            "columns are of types that cannot be. Write it again, or remove it from the folder."
        ) from error
    except OSError as error:
        raise _refuse_cache(cache, error) from error
    finally:
        if writing is not None:
            writing.let_go()
    pa.default_memory_pool().release_unused()  # the pool would hold on to the largest row group
    trim(bound)
    return dataset, hold


def _write_arrow(files: Sequence[Path], columns: dict[str, pa.DataType], folder: Path) -> "datasets.Dataset":
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    class PlainParquet(Parquet):
        def _cast_table(self, pa_table: pa.Table) -> pa.Table:
            return super()._cast_table(make_plain(pa_table))

    with _hush_datasets():
        # `datasets` itself goes by names and time stamps, so it is given the folder, which the content decides: files
        # that were touched, moved or copied are not converted again.
        builder = PlainParquet(
            data_files={"train": [str(file.resolve()) for file in files]},
            cache_dir=str(folder.parent.parent),
            dataset_name=folder.parent.name,
            config_id=folder.name,
            columns=list(columns),
            features=_make_features(columns),
            batch_size=1000,  # by default the first row group's rows, and 0 is refused
        )
        builder.download_and_prepare()
        dataset = builder.as_dataset(split="train")
    assert isinstance(dataset, datasets.Dataset)
    return dataset


def _refuse_cache(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache {cache} cannot be written ({error.strerror or error}); set FEDVLM_CACHE to a folder with room for "
        "a copy of the data."
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


@contextlib.contextmanager
def _hush_datasets() -> Generator[None]:
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
