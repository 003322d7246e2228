"""Columns of parquet shards, checked by the files' footers, before a single row is read.

Types that say the same in another way are read too: pictures in lists of one, in dictionaries or views; answers of
several people as texts or as structs with a field `answer` (as VQAv2 has them); `datasets.ClassLabel`s as their names.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as is_a

from fedvlm_jax.errors import UserError, explain_error, format_count
from fedvlm_jax.records.arrow_files import BINARIES, is_list, read_class_names

NEEDED = ("image", "question", "chosen")

# Columns by which other forms than RLAIF-V's are known.
OTHERS = frozenset({"images", "prompt", "messages", "conversations", "file_name"})

# Every column that some part of this package reads.
UNDERSTOOD = (
    *NEEDED,
    *("rejected", "ds_name", "origin_dataset", "origin_split", "idx", "image_path"),
    *("client", "split", "language", "question_client", "concept", "task", "group"),
)

TEXTS = (pa.string(), pa.large_string(), pa.string_view())
SAID = ("answer", "role")  # fields of an answer's struct, of which it has one: its text, or who says it


class _Shard(NamedTuple):
    """A file and its columns, those of named classes (`classes`) as text."""

    file: Path
    types: dict[str, pa.DataType]
    classes: frozenset[str]


def check_shards(files: Sequence[Path], plain: bool) -> None:
    """Check every footer; where the columns are RLAIF-V's, by `plain` and their names, their types too.

    Raises:
        UserError: a file that is no parquet or damaged, missing or mistyped columns, shards that disagree.
    """
    shards = list[_Shard]()
    for file in files:
        shard = _read_footer(file)
        if not plain or (OTHERS & {*shard.types} and not {*NEEDED} <= {*shard.types}):
            continue
        shards.append(shard)
        if missing := [column for column in NEEDED if column not in shard.types]:
            raise UserError(
                f"{file} lacks {_quote(missing)}; it has {_quote(shard.types)}. Needed are {_quote(NEEDED)} (RLAIF-V's "
                f"schema), or others by --data.columns {missing[0]}=NAME; understood as well: "
                f"{_quote(UNDERSTOOD[len(NEEDED) :])}."
            )
        for column, kind in shard.types.items():
            _check_type(file, column, kind)
        _check_agreement(shards[0], shard)


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
        raise UserError(
            f"{file} promises {format_count(count, 'row')} and has {sum(groups)}: it is damaged; write it again."
        )
    if twice := [column for column, times in Counter(schema.names).items() if times > 1]:
        raise UserError(f"{file} has more than one column {_quote(twice)}; keep the one that is meant.")
    classes = frozenset(read_class_names(schema))
    return _Shard(file, {e.name: pa.string() if e.name in classes else e.type for e in schema}, classes)


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
        held = [item.field(name).type for name in SAID if is_a.is_struct(item) and item.get_field_index(name) >= 0]
        if (held[0] if held else item) in TEXTS:
            return
    plain = _unwrap(kind)
    if not (plain in TEXTS or is_a.is_integer(plain) or is_a.is_null(plain)):
        several = ", a list of texts, or of structs with a text 'answer'" if column == "chosen" else ""
        mend = "Write it as text." if column in NEEDED else "Write it as text, or leave it out."
        raise UserError(f"{file}: column {column!r} is {kind}; expected text{several}. {mend}")


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


def _quote(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
