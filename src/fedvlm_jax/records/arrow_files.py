"""Records of parquet files and of Arrow files that `datasets` wrote: typed, and read a few rows at a time."""

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as is_a

from fedvlm_jax.errors import UserError, explain_error, find_machine_fault, format_count
from fedvlm_jax.records.conversations import UNREADABLE
from fedvlm_jax.records.files import LEFT_OUT, Record

BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view())
ROWS = 64  # rows that are Python's at a time, with their pictures


def read_parquet(file: Path, pictures: bool) -> Iterator[Record]:
    """Read a parquet file's rows; without `pictures` columns of bytes are `LEFT_OUT`, but lists are not.

    Raises:
        UserError: it is damaged, or none.
    """
    with _naming(file), pq.ParquetFile(file) as opened:
        schema = opened.schema_arrow
        kept = [field.name for field in schema if pictures or not _has_bytes(field.type)]
        for batch in opened.iter_batches(batch_size=ROWS, columns=kept):
            yield from _list_rows(batch, schema)


def read_arrow(file: Path, pictures: bool) -> Iterator[Record]:
    """Read the rows of an Arrow file, a stream of batches, as `read_parquet` does.

    Raises:
        UserError: it is damaged, or none.
    """
    with _naming(file), pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as opened:
        kept = [field.name for field in opened.schema if pictures or not _has_bytes(field.type)]
        for batch in opened:
            batch.validate(full=True)  # offsets that a stranger wrote may lead anywhere
            for start in range(0, len(batch), ROWS):
                yield from _list_rows(batch.slice(start, ROWS).select(kept), opened.schema)


@contextlib.contextmanager
def _naming(file: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:  # pyarrow raises a dozen kinds for a file that is damaged
        if find_machine_fault(error):
            raise
        raise UserError(
            f"{file} cannot be read to its end ({explain_error(error)}); it is damaged or its columns are of types "
            "that cannot be. Write it again, or remove it from the folder."
        ) from error


def is_list(kind: pa.DataType) -> bool:
    """Tell whether it is a list in any layout."""
    views = is_a.is_list_view(kind) or is_a.is_large_list_view(kind)
    return is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind) or views


def _has_bytes(kind: pa.DataType) -> bool:
    """Tell whether it holds bytes; not of lists, whose length says how many pictures there are."""
    if kind in BINARIES:
        return True
    return not is_list(kind) and any(_has_bytes(kind.field(place).type) for place in range(kind.num_fields))


def _list_rows(batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[Record]:
    """List rows with a value for every column of the schema, those of named classes as their names."""
    classes = read_class_names(schema)
    columns = {name: _list_values(batch.column(name)) for name in batch.schema.names}
    for name in filter(columns.__contains__, classes):
        names, codes = classes[name], columns[name]
        if unknown := [code for code in codes if code is not None and not -1 <= code < len(names)]:
            raise ValueError(
                f"column {name!r} has the class {unknown[0]}, and names for "
                f"{format_count(len(names), 'class', 'classes')}"
            )
        columns[name] = [None if code is None or code < 0 else names[code] for code in codes]
    for row in range(len(batch)):
        yield {name: columns[name][row] if name in columns else LEFT_OUT for name in schema.names}


def read_class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Find integer columns that `datasets` calls ClassLabel -> the names of their classes; odd metadata has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        about = {name: feature for name, feature in features.items() if isinstance(feature, Mapping)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    named = dict[str, list[str]]()
    for field in schema:
        feature = about.get(field.name, {})
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
        if is_a.is_integer(field.type) and isinstance(names, list) and names and all(isinstance(n, str) for n in names):
            named[field.name] = names
    return named


def _list_values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_read_value(column[row]) for row in range(len(column))]


def _read_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StructScalar):
            return {name: _read_value(value[name]) for name in value}
        return [_read_value(item) for item in value] if isinstance(value, pa.ListScalar) else UNREADABLE
