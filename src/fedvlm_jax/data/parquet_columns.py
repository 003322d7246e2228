"""Columns of parquet shards in RLAIF-V's form: checked by the files' footers, made plain while they become Arrow.

Types that say the same in another way are read too: pictures in lists of one, in dictionaries or views; answers of
several people as texts or as structs with a field `answer` (as VQAv2 has them); `datasets.ClassLabel`s as their names.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as is_a

from fedvlm_jax.errors import UserError, explain_error

NEEDED = ("image", "question", "chosen")

# Every column that some part of this package reads. Others mean nothing here, but rows can be told apart by them, so
# they are kept where they are plain (text, numbers, truth) and of one type in all shards.
UNDERSTOOD = (
    *NEEDED,
    *("rejected", "ds_name", "origin_dataset", "origin_split", "idx", "image_path"),
    *("client", "split", "language", "question_client", "concept", "task", "group"),
)

TEXTS = (pa.string(), pa.large_string(), pa.string_view())
BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view())
ANSWER = "answer"  # the field of an answer's struct that holds its text


class _Shard(NamedTuple):
    """A file, its number of rows, and its columns, those of named classes (`classes`) as text."""

    file: Path
    rows: int
    types: dict[str, pa.DataType]
    classes: frozenset[str]


def check_shards(files: Sequence[Path]) -> tuple[dict[str, pa.DataType], list[Path]]:
    """Check every footer; return the columns to be read, typed as in the first file, and the files with rows.

    Raises:
        UserError: a file that is no parquet or damaged, missing or mistyped columns, shards that disagree.
    """
    shards = list[_Shard]()
    for file in files:
        shard = _read_footer(file)
        shards.append(shard)
        for column, kind in shard.types.items():
            _check_type(file, column, kind)
        _check_agreement(shards[0], shard)
    kept = dict[str, pa.DataType]()
    for column, kind in shards[0].types.items():
        item = _unwrap(kind)
        plain = item in TEXTS or is_a.is_integer(item) or is_a.is_floating(item) or is_a.is_boolean(item)
        if column in UNDERSTOOD or (plain and all(shard.types.get(column) == kind for shard in shards)):
            kept[column] = kind
    return kept, [shard.file for shard in shards if shard.rows]


def _read_footer(file: Path) -> _Shard:
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
    if missing := [column for column in NEEDED if column not in schema.names]:
        raise UserError(
            f"{file} lacks {_quote(missing)}; it has {_quote(dict.fromkeys(schema.names))}. Needed are "
            f"{_quote(NEEDED)} (RLAIF-V's schema); understood as well: {_quote(UNDERSTOOD[len(NEEDED) :])}."
        )
    if twice := [column for column, times in Counter(schema.names).items() if times > 1]:
        raise UserError(f"{file} has more than one column {_quote(twice)}; keep the one that is meant.")
    classes = frozenset(_read_class_names(schema))
    return _Shard(file, count, {e.name: pa.string() if e.name in classes else e.type for e in schema}, classes)


def _check_agreement(first: _Shard, other: _Shard) -> None:
    if differing := [c for c in UNDERSTOOD if (c in first.types) != (c in other.types)]:
        raise UserError(
            f"{other.file} and {first.file} disagree: only one of them has {_quote(differing)}. All shards of a folder "
            "need the same columns; give one of them alone, or add the columns."
        )
    # Names would stand beside numbers.
    named = [c for c in UNDERSTOOD if (c in first.classes) != (c in other.classes)]
    if numbers := [c for c in named if (first if c in other.classes else other).types[c] not in TEXTS]:
        raise UserError(
            f"{other.file} and {first.file} disagree: only one of them has names for the classes of {_quote(numbers)}. "
            "Write both with `datasets`, or write the names as text."
        )


def _check_type(file: Path, column: str, kind: pa.DataType) -> None:
    if column == "image" and not _is_image(kind):
        raise UserError(
            f"{file}: column 'image' is {kind}; expected a struct of bytes and path (as `datasets.Image` writes "
            "it), the encoded bytes, or a path; or a list with one of these in every row."
        )
    if column == "image" or column not in UNDERSTOOD:
        return
    if column == "chosen" and is_list(kind):
        item = kind.value_type
        held = is_a.is_struct(item) and item.get_field_index(ANSWER) >= 0
        if (item.field(ANSWER).type if held else item) in TEXTS:
            return
    plain = _unwrap(kind)
    if not (plain in TEXTS or is_a.is_integer(plain) or is_a.is_null(plain)):
        several = ", a list of texts, or of structs with a text 'answer'" if column == "chosen" else ""
        mend = "Write it as text." if column in NEEDED else "Write it as text, or leave it out."
        raise UserError(f"{file}: column {column!r} is {kind}; expected text{several}. {mend}")


def is_list(kind: pa.DataType) -> bool:
    """Tell whether it is a list in any layout."""
    views = is_a.is_list_view(kind) or is_a.is_large_list_view(kind)
    return is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind) or views


def _unwrap(kind: pa.DataType) -> pa.DataType:
    """Return the type of a dictionary's words, or the type itself."""
    return kind.value_type if is_a.is_dictionary(kind) else kind


def _is_image(kind: pa.DataType) -> bool:
    kind = _unwrap(kind.value_type if is_list(kind) else kind)
    if not is_a.is_struct(kind):
        return kind in BINARIES + TEXTS
    parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    if "bytes" in parts:
        return parts["bytes"] in BINARIES or (is_a.is_null(parts["bytes"]) and "path" in parts)
    return "path" in parts


def _read_class_names(schema: pa.Schema) -> dict[str, list[str]]:
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


def make_plain(table: pa.Table) -> pa.Table:
    """Replace columns of types that are read but not kept; a `ValueError` where a row has no plain form.

    Raises:
        ValueError: a row with several pictures, or a class without a name.
    """
    names = _read_class_names(table.schema)
    for place, field in enumerate(table.schema):
        column = table.column(place).combine_chunks()
        if field.name == "image":
            column = _make_image(column)
        elif field.name in names:
            codes, words = column.to_pylist(), names[field.name]
            if unknown := [code for code in codes if code is not None and not -1 <= code < len(words)]:
                raise ValueError(
                    f"column {field.name!r} has the class {unknown[0]}, and names for {len(words)} classes"
                )
            column = pa.array([None if code is None or code < 0 else words[code] for code in codes], pa.string())
        elif field.name == "chosen" and is_list(field.type):
            column = _make_answers(column)
        else:
            continue
        table = table.set_column(place, field.name, column)
    return table


def _make_image(values: pa.Array) -> pa.Array:
    if is_list(values.type):  # its only item; null where a list is empty or null
        lists = values.cast(pa.list_(values.type.value_type))
        lengths = np.asarray(lists.value_lengths().fill_null(0))
        if (lengths > 1).any():
            row = int(np.argmax(lengths > 1))
            raise ValueError(
                f"a row has {lengths[row]} pictures (the {row + 1}. of its row group); expected one in each"
            )
        values = lists.flatten().take(pa.array(np.cumsum(lengths) - 1, pa.int64(), mask=lengths == 0))
    if is_a.is_dictionary(values.type):
        values = values.dictionary_decode()
    if is_a.is_binary_view(values.type):
        values = values.cast(pa.binary())
    return values.cast(pa.string()) if is_a.is_string_view(values.type) else values


def _make_answers(lists: pa.Array) -> pa.Array:
    """Make lists of texts, whatever the lists' layout. Bytes stay as they are: not all are UTF-8."""
    lists = lists.cast(pa.list_(lists.type.value_type))
    edges = np.cumsum([0, *lists.value_lengths().fill_null(0).to_pylist()])
    texts = lists.flatten()
    if is_a.is_struct(texts.type) and (place := texts.type.get_field_index(ANSWER)) >= 0:
        texts = texts.flatten()[place]
    missing = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), texts.cast(pa.string()), mask=missing)


def _quote(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
