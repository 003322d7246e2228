"""Parquet files and folders of shards, written once by `datasets` into the cache as Arrow and mapped from there.

The Arrow files are as large again as the shards; in memory there are a few row groups at a time. Columns are checked
from the files' footers (`parquet_columns.py`), before a single row is read. Images are read from the file, not through
the mapping: its pages count as the process's memory, so that an epoch over 14 GB would show as 14 GB.
"""

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedvlm_jax.data.parquet_columns import TEXTS, UNDERSTOOD, check_shards, is_list, make_plain
from fedvlm_jax.data.table import FACTS, ImageFacts, ImageLocations, Table
from fedvlm_jax.errors import UserError, explain_error, find_machine_fault
from fedvlm_jax.utils import cache_folders
from fedvlm_jax.utils.cache_folders import Hold, find_arrow, hold_table, read_bound
from fedvlm_jax.utils.digests import digest_files, digest_parts
from fedvlm_jax.utils.files import read_plain, write_bytes

if TYPE_CHECKING:
    import datasets  # takes a second to import

SEAL = "fedvlm-jax-seal.txt"
Columns = dict[str, pa.DataType]


def open_arrow(files: Sequence[Path]) -> tuple[pa.Table, ImageLocations]:
    """Map Arrow files one after the other, and find the bytes in their column `image`, a struct of bytes and path."""
    tables, owners, starts, lengths = [], [], [], []
    for number, file in enumerate(files):
        mapped = pa.memory_map(str(file)).read_buffer()
        table = pa.ipc.open_stream(mapped).read_all()
        tables.append(table)
        for chunk in table.column("image").chunks:
            values = chunk.flatten()[chunk.type.get_field_index("bytes")]
            _, offsets, content = values.buffers()
            start = length = np.zeros(len(values), np.int64)
            if content is not None:  # None where no row has any
                edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
                length = np.where(values.is_valid().to_numpy(zero_copy_only=False), np.diff(edges), 0)
                # An empty cell has no place: the address of this mapping would fit no seal of another mapping.
                start = np.where(length > 0, content.address + edges[:-1].astype(np.int64) - mapped.address, 0)
            assert ((length == 0) | ((start >= 0) & (start + length <= mapped.size))).all(), "not mapped but copied"
            owners.append(np.full(len(chunk), number))
            starts.append(start)
            lengths.append(length)
    places = (np.concatenate(parts).astype(np.int64) for parts in (owners, starts, lengths))
    return pa.concat_tables(tables), ImageLocations(tuple(files), *places)


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
    table = _open_cached(filled, columns, digest)
    if digest_files(filled) != digest:
        raise UserError(f"{path} was changed while it was read; try again when nobody writes it.")
    folder = path if path.is_dir() else path.parent
    return dataclasses.replace(table, name=name or str(path), folder=folder, digest=digest)


def _open_cached(files: list[Path], columns: Columns, digest: str) -> Table:
    """Open the Arrow files of these shards; where they are damaged they are written again, once."""
    # The folder is that of this content, read as these columns.
    kept = find_arrow() / digest / "rows" / digest_parts([repr(_make_features(columns)).encode()]).hex()
    found, table = kept.is_dir(), None
    try:
        table = _open_sealed(files, columns, kept)
    except Exception as error:  # whatever is wrong with the Arrow files, the shards are there
        if not found or find_machine_fault(error):
            raise
    if table is None and found:
        gc.collect()  # tables that nobody reads any more would hold their files
        for entry in cache_folders.list_entries([cache_folders.ARROW]):
            if kept in (entry.path, *entry.path.parents) and not cache_folders.remove(entry):
                raise UserError(
                    f"{entry.path} is damaged, and a running process uses it: end that, or set FEDVLM_CACHE to another "
                    "folder"
                )
        table = _open_sealed(files, columns, kept)
    if table is None:
        raise UserError(f"{kept} is not what was just written there: its disk is damaged; set FEDVLM_CACHE to another")
    return table


def _open_sealed(files: list[Path], columns: Columns, folder: Path) -> Table | None:
    """Convert shards and open the result; None where that does not fit its seal."""
    dataset, hold = convert_shards(files, columns, folder)
    table = open_dataset(dataset)
    # Where the seal does not fit nothing refers to the hold any more, and that ends it.
    return dataclasses.replace(table, hold=hold) if _check_seal(table) else None


def open_dataset(dataset: "datasets.Dataset") -> Table:
    """Map the Arrow files of a data set that `datasets` has in its cache, whose column `image` is not decoded."""
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    data, locations = open_arrow(files)
    return Table("", data, files[0].parent, locations, ImageFacts.open(files[0].parent / FACTS))


def _check_seal(table: Table) -> bool:
    """Compare a table with the seal beside its files, or seal it where it was just written."""
    data, images = table.data, table.locations
    assert images is not None
    # Everything but the encoded images, which are compared with their digests when they are decoded.
    parts = [np.frombuffer(data.schema.serialize(), np.uint8), images.file, images.start, images.length]
    for name in data.column_names:
        for chunk in data.column(name).chunks:
            sealed = chunk.flatten()[chunk.type.get_field_index("path")] if name == "image" else chunk
            parts += [np.frombuffer(buffer, np.uint8) for buffer in sealed.buffers() if buffer is not None]
    found = digest_parts(parts, len(data), *(file.stat().st_size for file in images.files)).hex()
    file = images.files[0].parent / SEAL
    if file.exists():
        return read_plain(file) == found.encode()
    with contextlib.suppress(OSError):  # without a seal it is as good as one just written
        write_bytes(file, found.encode())
    return True


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


def convert_shards(files: Sequence[Path], columns: Columns, folder: Path) -> tuple["datasets.Dataset", Hold | None]:
    """Let `datasets` write the shards into the cache as Arrow, once per content, and hold what it wrote.

    Raises:
        UserError: a shard is damaged, the cache cannot be written or its bound is none.
    """
    import datasets.exceptions

    cache, bound = find_arrow(), read_bound()
    try:
        dataset, hold = _write_arrow(files, columns, folder)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError, OSError) as error:
        fault = error if isinstance(error, OSError) else find_machine_fault(error)
        if isinstance(fault, OSError):
            raise UserError(
                f"the cache {cache} cannot be written ({fault.strerror or fault}); set FEDVLM_CACHE to a folder with "
                "room for a copy of the data."
            ) from error
        if fault is not None:
            raise fault from None
        broken = _find_damaged(files, list(columns))
        where = str(broken or (files[0] if len(files) == 1 else f"one of the {len(files)} files in {files[0].parent}"))
        raise UserError(
            f"{where} cannot be read to its end ({explain_error(error.__cause__ or error)}); it is damaged or its "
            "columns are of types that cannot be. Write it again, or remove it from the folder."
        ) from error
    pa.default_memory_pool().release_unused()  # the pool would hold on to the largest row group
    cache_folders.trim(bound)
    return dataset, hold


def _write_arrow(files: Sequence[Path], columns: Columns, folder: Path) -> tuple["datasets.Dataset", Hold | None]:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    class PlainParquet(Parquet):
        def _cast_table(self, pa_table: pa.Table) -> pa.Table:
            return super()._cast_table(make_plain(pa_table))

    writing = Hold(find_arrow())
    # No bars, and no log of the errors that are raised anyway.
    logger, bars = logging.getLogger("datasets"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
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
        return dataset, hold_table(Path(dataset.cache_files[0]["filename"]).parent)
    finally:
        writing.let_go()
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


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
