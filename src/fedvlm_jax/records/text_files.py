"""Records of text files: JSON (lines, a list, COCO's object) and CSV. No more than a record is in memory at a time.

What strangers wrote may be endless, nested without end or no UTF-8: records have a bound, and bytes that are no UTF-8
spoil the text that they are in, not the file.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.records.conversations import is_plain, to_text
from fedvlm_jax.records.files import Record
from fedvlm_jax.utils.option_ranges import shorten

LONGEST = 2**26  # characters of a record, with pictures in base64 in it
CHUNK = 2**20  # characters that are read at a time, at least
SPACE = " \t\r\n"


def _open(file: Path) -> IO[str]:
    with file.open("rb") as opened:
        if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{file} is in UTF-16, as its byte order mark says; write it in UTF-8.")
    return file.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_json(file: Path) -> Iterator[Record]:
    """Read the objects of a list, or of lines.

    Raises:
        UserError: a list is damaged, or a record is too long.
    """
    with _open(file) as opened:
        reader = _Reader(file, opened)
        if reader.peek() == "[":
            for _, value in reader.read_lists():
                yield value if isinstance(value, dict) else "record is no JSON object"
            return
        opened.seek(0)
        while line := opened.readline(LONGEST + 1):
            if len(line) > LONGEST:
                raise UserError(f"{file} has a line of more than {LONGEST} characters; is it a file of JSON lines?")
            if line.strip():
                yield _parse_line(line)


def _parse_line(line: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else "line is no JSON object"


def read_coco(file: Path) -> Iterator[Record]:
    """Read the pictures of COCO's captions, each with all its captions, which are in memory together.

    Raises:
        UserError: it is no object with `images` and `annotations` that have captions.
    """
    captions, seen, kinds = dict[Any, list[Any]](), set[Any](), set[str]()
    for kind, value in _read_object(file):
        kinds.add(kind)
        if kind != "annotations":
            continue
        if not isinstance(value, dict) or "caption" not in value:
            raise UserError(f"{file} has annotations without 'caption'; expected COCO's captions.")
        number = value.get("image_id")
        captions.setdefault(number if isinstance(number, int | str) else None, []).append(value["caption"])
    if missing := {"images", "annotations"} - kinds:
        raise UserError(f"{file} has no {' and no '.join(sorted(missing))}; expected COCO's captions, or a JSON list.")
    for kind, value in _read_object(file):
        if kind != "images":
            continue
        number = value.get("id") if isinstance(value, dict) else None
        if not isinstance(number, int | str):
            yield "picture without an id"
            continue
        seen.add(number)
        about = {name: held for name, held in value.items() if is_plain(held) and name not in ("id", "file_name")}
        yield about | {"idx": number, "image": value.get("file_name"), "chosen": captions.get(number, [])}
    yield from ("caption of no picture" for number in captions.keys() - seen for _ in captions[number])


def _read_object(file: Path) -> Iterator[tuple[str, Any]]:
    with _open(file) as opened:
        yield from _Reader(file, opened).read_lists()


def read_csv(file: Path) -> Iterator[Record]:
    """Read the rows under a first row of names; cells are text, and empty ones are missing.

    Raises:
        UserError: two columns have one name, or a quote is never closed.
    """
    before = csv.field_size_limit(LONGEST)
    try:
        with _open(file) as opened:
            head = opened.readline(LONGEST)
            opened.seek(0)
            # By the first row, not the file's name: spreadsheets of half the world write semicolons.
            rows = csv.reader(opened, delimiter=max(",;\t", key=head.count), strict=True)
            names = _read_names(file, rows)
            while True:
                try:
                    cells = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    if "unexpected end" in str(error):
                        raise UserError(f"{file} ends inside of quotes that are never closed.") from None
                    yield "row is no CSV"
                    continue
                if len(cells) == len(names):
                    yield {name: cell or None for name, cell in zip(names, cells, strict=True)}
                elif cells:
                    yield "row has more or fewer cells than the first row"
    finally:
        csv.field_size_limit(before)


def _read_names(file: Path, rows: Iterator[list[str]]) -> list[str]:
    try:
        names = [to_text(name.strip()) or "" for name in next(rows, [])]
    except csv.Error as error:
        raise UserError(f"{file} has no first row of names ({error}).") from error
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{file} has more than one column {shorten(repr(twice[0]))}; keep the one that is meant.")
    return names


class _Reader:
    """JSON that is read value by value: the items of a list, or of the lists in an object."""

    def __init__(self, file: Path, opened: IO[str]) -> None:
        self._file, self._opened = file, opened
        self._buffer, self._at, self._read, self._ended = "", 0, 0, False
        self._decode = json.JSONDecoder().raw_decode

    def read_lists(self) -> Iterator[tuple[str, Any]]:
        """Read the items of all lists, each with the name of its list; "" where the file is a list."""
        if self.peek() != "{":
            yield from (("", item) for item in self._read_items("[", "]"))
        else:
            for name in self._read_items("{", "}"):
                self._expect(":")
                if self.peek() == "[":
                    yield from ((str(name), item) for item in self._read_items("[", "]"))
                else:
                    self._read_value()
        if self.peek():
            raise self._fail()

    def _read_items(self, start: str, end: str) -> Iterator[Any]:
        """Read the items of a list, or the names in an object, whose values are read by who iterates."""
        self._expect(start)
        comma = False
        while self.peek() != end:
            if comma:
                self._expect(",")
            comma = True
            yield self._read_value()
        self._expect(end)

    def _read_value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # else a number might go on
                    self._at = end
                    return value
            except (ValueError, RecursionError):
                if self._ended or len(self._buffer) - self._at > LONGEST:
                    raise self._fail() from None
            self._fill()

    def peek(self) -> str:
        """Return the next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def _expect(self, mark: str) -> None:
        if self.peek() != mark:
            raise self._fail()
        self._at += 1

    def _fill(self) -> None:
        """Read on: as much again as is there, so that a long value is not tried too often."""
        more = self._opened.read(max(CHUNK, len(self._buffer) - self._at))
        self._read += self._at
        self._buffer, self._at, self._ended = self._buffer[self._at :] + more, 0, not more

    def _fail(self) -> UserError:
        return UserError(f"{self._file} is no JSON, or cut short, from character {self._read + self._at} on.")
