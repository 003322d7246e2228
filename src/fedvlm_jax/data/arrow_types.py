"""Columns of types that say the same in another way, made plain while parquet becomes Arrow.

Pictures in lists of one, in dictionaries or views; answers of several people as texts or as structs with a field
`answer` (as VQAv2 has them); `datasets.ClassLabel`s, whose names stand in the file's metadata, as those names.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["find_item", "is_list", "make_builder", "make_plain", "read_class_names"]

ANSWER = "answer"
"""The field of an answer's struct that holds its text."""


def make_builder(**options: Any) -> "datasets.ArrowBasedBuilder":
    """Make `datasets`' own reader of parquet, with these options, that also takes what `make_plain` makes plain."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    class PlainParquet(Parquet):
        def _cast_table(self, pa_table: "pa.Table") -> "pa.Table":
            return super()._cast_table(make_plain(pa_table))

    return PlainParquet(**options)


def make_plain(table: "pa.Table") -> "pa.Table":
    """Replace the columns that need it, row for row.

    Raises:
        ValueError: a row with several pictures, or a class without a name.
    """
    names = read_class_names(table.schema)
    for place, field in enumerate(table.schema):
        column = table.column(place).combine_chunks()
        if field.name == "image":
            made = _make_image(column)
        elif field.name in names:
            made = _name_classes(field.name, column, names[field.name])
        elif field.name == "chosen" and is_list(field.type):
            made = _make_answers(column)
        else:
            continue
        table = table.set_column(place, field.name, made)
    return table


def is_list(kind: "pa.DataType") -> bool:
    """Is it a list in any layout?"""
    import pyarrow.types as is_a

    views = is_a.is_list_view(kind) or is_a.is_large_list_view(kind)
    return is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind) or views


def find_item(kind: "pa.DataType") -> "pa.DataType":
    """The type of a single answer in a list of them: of the struct's field, or of the item itself."""
    import pyarrow.types as is_a

    item = kind.value_type
    if is_a.is_struct(item) and item.get_field_index(ANSWER) >= 0:
        return item.field(ANSWER).type
    return item


def read_class_names(schema: "pa.Schema") -> dict[str, tuple[str, ...]]:
    """Integer columns that `datasets` calls ClassLabel -> the names of their classes; odd metadata says nothing."""
    import pyarrow.types as is_a

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        said = {name: feature["names"] for name, feature in features.items() if _is_label(feature)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    integers = {field.name for field in schema if is_a.is_integer(field.type)}
    return {name: tuple(names) for name, names in said.items() if name in integers}


def _is_label(feature: Any) -> bool:
    if not isinstance(feature, Mapping) or feature.get("_type") != "ClassLabel":
        return False
    names = feature.get("names")
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def _name_classes(column: str, values: "pa.Array", names: tuple[str, ...]) -> "pa.Array":
    import pyarrow as pa

    codes = values.to_pylist()
    unknown = [code for code in codes if code is not None and not -1 <= code < len(names)]
    if unknown:
        raise ValueError(f"column {column!r} has the class {unknown[0]}, and names for {len(names)} classes")
    return pa.array([None if code is None or code < 0 else names[code] for code in codes], pa.string())


def _make_image(values: "pa.Array") -> "pa.Array":
    import pyarrow as pa
    import pyarrow.types as is_a

    if is_list(values.type):
        values = _take_single(values)
    if is_a.is_dictionary(values.type):
        values = values.dictionary_decode()
    if is_a.is_binary_view(values.type):
        values = values.cast(pa.binary())
    return values.cast(pa.string()) if is_a.is_string_view(values.type) else values


def _take_single(lists: "pa.Array") -> "pa.Array":
    """The only item of every list; null where a list is empty or null."""
    import pyarrow as pa

    lists = lists.cast(pa.list_(lists.type.value_type))
    lengths = np.asarray(lists.value_lengths().fill_null(0))
    if (lengths > 1).any():
        row = int(np.argmax(lengths > 1))
        raise ValueError(f"a row has {lengths[row]} pictures (the {row + 1}. of its row group); expected one in each")
    places = np.cumsum(lengths) - 1
    return lists.flatten().take(pa.array(places, pa.int64(), mask=lengths == 0))


def _make_answers(lists: "pa.Array") -> "pa.Array":
    """Lists of texts, whatever the lists' layout and the texts' type. Bytes stay as they are: not all are UTF-8."""
    import pyarrow as pa
    import pyarrow.types as is_a

    lists = lists.cast(pa.list_(lists.type.value_type))
    edges = np.cumsum([0, *lists.value_lengths().fill_null(0).to_pylist()])
    texts = lists.flatten()
    if is_a.is_struct(texts.type) and (place := texts.type.get_field_index(ANSWER)) >= 0:
        texts = texts.flatten()[place]
    missing = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), texts.cast(pa.string()), mask=missing)
