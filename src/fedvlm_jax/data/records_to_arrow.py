"""Records of any form made a table: twice through the files, once for the columns and once to write them as Arrow.

The Arrow files are kept by what the files hold and how they are read (`arrow_cache.py`). Pictures that are files stay
files: the table has their names.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from fedvlm_jax.data.arrow_cache import open_cached
from fedvlm_jax.data.config import FAULT, PICTURE_COLUMNS
from fedvlm_jax.data.forms.base import FormOptions
from fedvlm_jax.data.record_rows import ANSWERS, PICTURES, QUESTIONS, Row, make_rows
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.records.files import Content
from fedvlm_jax.utils.cache_folders import read_bound
from fedvlm_jax.utils.digests import digest_files
from fedvlm_jax.utils.option_ranges import shorten

VERSION = 3  # of the rules by which records become rows: tables of another one are made again
MOST_COLUMNS = 500
SHOWN = 16  # columns that a message lists
ROWS, BYTES = 1000, 2**24  # of rows that are written at a time, at most
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclasses.dataclass
class _Found:
    """What the first reading finds: columns of rows, those of records, whether answers are of several people.

    Of its rows so many are lost, the first of them by the fault.
    """

    columns: dict[str, None]
    theirs: dict[str, None]
    several: bool = False
    asked: bool = False
    pictured: bool = False
    rows: int = 0
    lost: int = 0
    faults: str = ""


def read_content(options: FormOptions) -> Table:
    """Open the table of one's own data, which are converted once.

    Raises:
        UserError: nothing is there, a file is damaged, columns are missing, or files change while they are read.
    """
    read_bound()  # a wrong value in the environment is refused before anything is done
    content = options.find_content()
    parts = [(part.base, part.split, *([part.label] if part.label else [])) for part in content.parts]
    form = repr((VERSION, options.form, options.reading, parts))
    table = open_cached(content.digest, form, lambda: _make_tables(options, content))
    data = table.data if table.data[FAULT].null_count < len(table) else table.data.drop_columns([FAULT])
    facts: Any = {"folder": content.folder, "digest": content.digest, "revision": content.revision}
    return dataclasses.replace(table, name=options.source, data=data, form=options.form, **facts)


def _list_rows(options: FormOptions, content: Content, found: _Found | None = None) -> Iterator[Row]:
    """List all rows, with their pictures; or without them, and note the columns that records have."""
    reading = options.reading
    for part in content.parts:
        for record in options.read_records(part, pictures=found is None):
            if found is not None and isinstance(record, dict):
                found.theirs |= dict.fromkeys(record)
            yield from make_rows(record, part, reading)


def _make_tables(options: FormOptions, content: Content) -> Iterator[pa.Table]:
    found = _find_columns(options, content)
    texts = pa.list_(pa.string()) if found.several else pa.string()
    places = {name: place for place, name in enumerate(found.theirs)}
    names = sorted(found.columns, key=lambda name: places.get(name, len(places)))
    given = {"chosen": texts, **dict.fromkeys(PICTURE_COLUMNS, PICTURE)}
    kinds = {name: given.get(name, pa.string()) for name in names}
    schema, rows, size = pa.schema(list(kinds.items())), list[Row](), 0
    for row in _list_rows(options, content):
        if found.several and isinstance(row.get("chosen"), str):
            row["chosen"] = [row["chosen"]]
        rows.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        size += sum(len((row.get(name) or {}).get("bytes") or b"") for name in PICTURE_COLUMNS)
        if len(rows) == ROWS or size > BYTES:
            yield pa.Table.from_pylist(rows, schema)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema)
    # Here, so that nothing is kept under the digest of what was there before.
    files = [part.file for part in content.parts]  # or the folder of classes, whose pictures are looked at when needed
    if all(file.is_file() for file in files) and digest_files(files) != content.digest:
        raise UserError(f"{options.source} was changed while it was read; try again when nobody writes it.")


def _find_columns(options: FormOptions, content: Content) -> _Found:
    """Read all records, without embedded pictures, for the columns of their rows.

    Raises:
        UserError: there are no rows, or too many columns, or none that say what is needed.
    """
    found = _Found(dict.fromkeys(("image", "question", "chosen", FAULT)), {})
    for row in _list_rows(options, content, found):
        found.columns |= dict.fromkeys(row)
        found.rows += 1
        found.several = found.several or isinstance(row.get("chosen"), list)
        found.asked = found.asked or bool(row.get("question"))
        found.pictured = found.pictured or bool(row.get("image"))
        found.faults = found.faults or row.get(FAULT, "")
        found.lost += FAULT in row
        if len(found.theirs) > MOST_COLUMNS:
            raise UserError(f"{options.source} has more than {MOST_COLUMNS} columns; is it a table of pictures?")
    if not found.rows:
        raise UserError(f"{options.source} has no rows; expected at least one image with question and answer.")
    _check_columns(options, found)
    return found


def _show(names: Iterable[str]) -> str:
    return ", ".join([shorten(repr(name)) for name in names][:SHOWN]) or "nothing"


def _check_columns(options: FormOptions, found: _Found) -> None:
    reading = options.reading
    has = _show(found.theirs)
    if not found.theirs or found.lost == found.rows:
        raise UserError(
            f"{options.source} cannot be read as {options.form}: all {format_count(found.rows, 'row')}: {found.faults}"
        )
    if unknown := [theirs for _, theirs in reading.columns if theirs not in found.theirs]:
        raise UserError(f"--data.columns names {unknown[0]!r}; {options.source} has {has}")
    names = {name for name in found.theirs if name not in {theirs for _, theirs in reading.columns}}
    names |= {ours for ours, _ in reading.columns}
    there = {"image": found.pictured or {*PICTURES} & names, "question": found.asked or {*QUESTIONS} & names}
    for what, has_it in {**there, "chosen": {*ANSWERS} & names}.items():
        if not has_it:
            fixed = ", or ask all alike with --data.question TEXT" if what == "question" else ""
            used = {theirs for _, theirs in reading.columns}
            beside = " beside those that --data.columns names" if used else ""
            has = _show(name for name in found.theirs if name not in used)
            raise UserError(
                f"{options.source} has no column {what!r}{beside}; it has {has}. Say which one it is: --data.columns "
                f"{what}=NAME{fixed}."
            )
