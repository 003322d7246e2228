"""Tables written once by `datasets` into the cache as Arrow and mapped from there, whatever form they come from.

The Arrow files are as large again as what they were made of; in memory there are a few batches at a time. Images are
read from the file, not through the mapping: its pages count as the process's memory, so that an epoch over 14 GB would
show as 14 GB.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedvlm_jax.data.config import PICTURE_COLUMNS
from fedvlm_jax.data.table import FACTS, ImageFacts, ImageLocations, Table
from fedvlm_jax.errors import UserError, explain_error, find_machine_fault
from fedvlm_jax.utils import cache_folders
from fedvlm_jax.utils.cache_folders import Hold, find_arrow, hold_table, read_bound
from fedvlm_jax.utils.digests import digest_parts
from fedvlm_jax.utils.files import read_plain, write_bytes

if TYPE_CHECKING:
    import datasets  # takes a second to import

SEAL = "fedvlm-jax-seal.txt"
MakeTables = Callable[[], Iterator[pa.Table]]


def open_arrow(files: Sequence[Path]) -> tuple[pa.Table, ImageLocations]:
    """Map Arrow files one after the other, and find the bytes in their columns of images, structs of bytes and path."""
    tables, owners, starts, lengths = [], [], [], []
    for number, file in enumerate(files):
        mapped = pa.memory_map(str(file)).read_buffer()
        table = pa.ipc.open_stream(mapped).read_all()
        tables.append(table)
        named = itertools.takewhile(table.column_names.__contains__, PICTURE_COLUMNS)
        found = [_locate(table.column(name), mapped) for name in named]
        owners.append(np.full(len(table), number))
        starts.append(np.stack([start for start, _ in found], axis=1))
        lengths.append(np.stack([length for _, length in found], axis=1))
    places = (np.concatenate(parts).astype(np.int64) for parts in (owners, starts, lengths))
    return pa.concat_tables(tables), ImageLocations(tuple(files), *places)


def _locate(column: pa.ChunkedArray, mapped: pa.Buffer) -> tuple[np.ndarray, np.ndarray]:
    """Find where in a mapped file a column's bytes start [N], and how many they are [N]."""
    starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        values = chunk.flatten()[chunk.type.get_field_index("bytes")]
        _, offsets, content = values.buffers()
        start = length = np.zeros(len(values), np.int64)
        if content is not None:  # None where no row has any
            edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
            length = np.where(values.is_valid().to_numpy(zero_copy_only=False), np.diff(edges), 0)
            # An empty cell has no place: the address of this mapping would fit no seal of another mapping.
            start = np.where(length > 0, content.address + edges[:-1].astype(np.int64) - mapped.address, 0)
        assert ((length == 0) | ((start >= 0) & (start + length <= mapped.size))).all(), "not mapped but copied"
        starts.append(start)
        lengths.append(length)
    return np.concatenate(starts), np.concatenate(lengths)


def open_cached(digest: str, form: str, make_tables: MakeTables) -> Table:
    """Open the Arrow files that were made of a content; where there are none, or damaged ones, they are written, once.

    Args:
        digest: of the content.
        form: how it is read: the same content read otherwise has Arrow files of its own.
        make_tables: makes what they hold, part by part.

    Raises:
        UserError: they cannot be converted, or the cache cannot be written.
    """
    kept = find_arrow() / digest / "rows" / digest_parts([form.encode()]).hex()
    found, table = kept.is_dir(), None
    try:
        table = _open_sealed(kept, make_tables)
    except Exception as error:  # whatever is wrong with the Arrow files, what they were made of is there
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
        table = _open_sealed(kept, make_tables)
    if table is None:
        raise UserError(f"{kept} is not what was just written there: its disk is damaged; set FEDVLM_CACHE to another")
    return table


def _open_sealed(folder: Path, make_tables: MakeTables) -> Table | None:
    """Write and open Arrow files; None where they do not fit their seal."""
    dataset, hold = convert(folder, make_tables)
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
    pictures = PICTURE_COLUMNS[: images.start.shape[1]]
    for name in data.column_names:
        for chunk in data.column(name).chunks:
            sealed = chunk.flatten()[chunk.type.get_field_index("path")] if name in pictures else chunk
            parts += [np.frombuffer(buffer, np.uint8) for buffer in sealed.buffers() if buffer is not None]
    found = digest_parts(parts, len(data), *(file.stat().st_size for file in images.files)).hex()
    file = images.files[0].parent / SEAL
    if file.exists():
        return read_plain(file) == found.encode()
    with contextlib.suppress(OSError):  # without a seal it is as good as one just written
        write_bytes(file, found.encode())
    return True


def convert(folder: Path, make_tables: MakeTables) -> tuple["datasets.Dataset", Hold | None]:
    """Let `datasets` write a folder of the cache, once, and hold what it wrote.

    Raises:
        UserError: what it reads is damaged, the cache cannot be written or its bound is none.
    """
    import datasets.exceptions

    cache, bound = find_arrow(), read_bound()
    try:
        dataset, hold = _write_arrow(folder, make_tables)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError, OSError) as error:
        if isinstance(error.__cause__, UserError):
            raise UserError(str(error.__cause__)) from error  # the same one again would be its own context
        fault = error if isinstance(error, OSError) else find_machine_fault(error)
        if isinstance(fault, OSError):
            raise UserError(
                f"the cache {cache} cannot be written ({fault.strerror or fault}); set FEDVLM_CACHE to a folder with "
                "room for a copy of the data."
            ) from error
        if fault is not None:
            raise fault from None
        raise UserError(f"the data cannot be read to their end ({explain_error(error.__cause__ or error)}).") from error
    pa.default_memory_pool().release_unused()  # the pool would hold on to the largest batch
    cache_folders.trim(bound)
    return dataset, hold


def _write_arrow(folder: Path, make_tables: MakeTables) -> tuple["datasets.Dataset", Hold | None]:
    import datasets
    from datasets.builder import Key

    class Builder(datasets.ArrowBasedBuilder):
        def _info(self) -> datasets.DatasetInfo:
            return datasets.DatasetInfo()

        def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
            return [datasets.SplitGenerator(name="train")]

        def _generate_tables(self, **kwargs: Any) -> Iterator[tuple[Key, pa.Table]]:
            yield from ((Key(0, number), table) for number, table in enumerate(make_tables()))

    writing = Hold(find_arrow())
    # No bars, and no log of the errors that are raised anyway.
    logger, bars = logging.getLogger("datasets"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        # `datasets` itself goes by names and time stamps, so it is given the folder, which the content decides: files
        # that were touched, moved or copied are not converted again.
        root, name = str(folder.parent.parent), folder.parent.name
        builder = Builder(cache_dir=root, dataset_name=name, config_id=folder.name)
        builder.download_and_prepare()
        dataset = builder.as_dataset(split="train")
        assert isinstance(dataset, datasets.Dataset)
        return dataset, hold_table(Path(dataset.cache_files[0]["filename"]).parent)
    finally:
        writing.let_go()
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
