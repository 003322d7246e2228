"""A record of any form made the rows of a table: pictures, question, answers, and the plain values beside them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from fedvlm_jax.data.config import FAULT, INLINE, MOST_PICTURES, PICTURE_COLUMNS, TURNS
from fedvlm_jax.data.forms.base import Reading
from fedvlm_jax.errors import format_count
from fedvlm_jax.records.conversations import (
    Turn,
    UnusableError,
    count_places,
    is_messages,
    is_plain,
    join_turns,
    list_answers,
    place_pictures,
    read_turns,
    to_text,
    write_turns,
)
from fedvlm_jax.records.files import LEFT_OUT, Part, Record

Row = dict[str, Any]

# Columns that say the same: one that `--data.columns` names counts, else the first that has a value.
PICTURES = ("image", "images", "file_name", "file_names")
QUESTIONS = ("question", "prompt")
ANSWERS = ("chosen", "messages", "conversations")
ANSWER = "answer"  # the field of an answer's object that holds its text, as VQAv2 has it
READ = frozenset((*PICTURES, *PICTURE_COLUMNS, *QUESTIONS, *ANSWERS, "rejected", "idx", "id", FAULT, TURNS))
UNREAD: Row = {"bytes": None, "path": None}  # a picture of which only the place is known


class _Example(NamedTuple):
    """A prompt's turns, what is answered, and the column of the rejected answer, where there is one."""

    turns: Sequence[Turn]
    chosen: Any
    rejected: Row


def make_rows(record: Record, part: Part, reading: Reading) -> list[Row]:
    """Make the rows of a record; one of a record that cannot be used, with the reason in `FAULT`."""
    if isinstance(record, str):
        return [{FAULT: record}]
    record = rename(record, reading.columns)
    plain = {name: value for name, value in record.items() if name not in READ and is_plain(value)}
    # `datasets` cuts a name at a NUL, and what is no UTF-8 cannot be written.
    row: Row = {name: to_text(value) for name, value in plain.items() if to_text(name) == name and "\0" not in name}
    if named := [record[name] for name in ("idx", "id") if name in record]:
        row["idx"] = to_text(named[0])
    if part.split and row.get("split") is None:
        row["split"] = to_text(part.split)
    try:
        examples, talk, inside = _read_examples(record, reading)
        pictures = _read_pictures(record, inside, part.base)
        # A row without pictures is found later, as in all tables; of those that were not read nobody knows how many.
        if (places := count_places(talk)) not in (0, len(pictures)) and pictures and UNREAD not in pictures:
            raise UnusableError(f"{format_count(len(pictures), 'picture')} for {format_count(places, 'place')}")
        # Each example has the pictures that stand in its prompt; where none says where, all.
        held = [pictures[: count_places(example.turns) if places else None] for example in examples]
        made = [_make_example(*example, some, reading) for example, some in zip(examples, held, strict=True)]
    except UnusableError as error:
        return [row | {FAULT: str(error)}]
    row["image"] = None
    if reading.client_folder is not None:
        row["client"] = _name_folder(pictures[0]["path"] if pictures else None, reading.client_folder)
    rows = [
        row | dict(zip(PICTURE_COLUMNS, some, strict=False)) | example for some, example in zip(held, made, strict=True)
    ]
    for number, example in enumerate(rows[1:] if row.get("idx") else [], 2):
        example["idx"] = f"{row['idx']}/{number}"
    return rows


def rename(record: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Give a record's columns our names; other columns that say the same as one of these are left out.

    >>> rename({"photo": "a.png", "images": [], "caption": "a cat"}, [("image", "photo"), ("chosen", "caption")])
    {'image': 'a.png', 'chosen': 'a cat'}
    """
    ours, theirs = {name for name, _ in columns}, {name for _, name in columns}
    same = {name for group in (PICTURES, QUESTIONS, ANSWERS) if ours & {*group} for name in group}
    kept = {name: value for name, value in record.items() if name not in theirs | same | ours}
    return kept | {name: record[other] for name, other in columns if other in record}


def _find(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, [])), None)


def _read_examples(record: Mapping[str, Any], reading: Reading) -> tuple[list[_Example], Sequence[Turn], list[Any]]:
    """Read what a record asks and answers: examples, the turns that say where pictures stand, and those in messages."""
    prompt, answers = _find(record, QUESTIONS), _find(record, ANSWERS)
    before, pictures = read_turns(prompt) if is_messages(prompt) else (_ask(prompt), [])
    talks = answers is not None and _find(record, ANSWERS[:1]) is None
    if not talks and not is_messages(answers):
        return [_Example(before, _read_answers(answers), _read_rejected(record, []))], before, pictures
    turns, more = read_turns(answers)
    answered = list_answers(turns)
    if talks:
        chosen = answered if reading.each else answered[-1:]
        return [_Example(earlier, text, {}) for earlier, text in chosen], turns, more
    earlier, text = answered[-1]
    # Some sets have the prompt in both answers, with or without a column of its own.
    before = list(earlier) if any(turn.role == "user" for turn in earlier) else [*before, *earlier]
    return [_Example(before, text, _read_rejected(record, earlier))], before, pictures or more


def _ask(prompt: Any) -> list[Turn]:
    if not is_plain(prompt):
        raise UnusableError("question is no text")
    text = to_text(prompt)
    return [] if text is None else [Turn("user", text)]


def _make_example(turns: Sequence[Turn], chosen: Any, rejected: Row, pictures: Sequence[Row], reading: Reading) -> Row:
    if not any(turn.role == "user" and turn.text.strip() for turn in turns) and reading.question:
        turns = [*(turn for turn in turns if turn.text.strip()), Turn("user", reading.question)]
    turns, count = place_pictures(turns, len(pictures)), len(pictures)
    example: Row = {"question": join_turns(turns), "chosen": chosen, **rejected}
    # What a single text with its picture before it says is all in the other columns.
    plain = len(turns) < 2 and count < 2 and all(turn.parts[:1] in ((), (None,)) for turn in turns)
    return example if plain or count_places(turns) != count else example | {TURNS: write_turns(turns)}


def _read_rejected(record: Mapping[str, Any], earlier: Sequence[Turn]) -> Row:
    """Read the rejected answer, which must answer what the chosen one does."""
    if "rejected" not in record:
        return {}
    rejected = record["rejected"]
    if not is_messages(rejected):
        if not is_plain(rejected):
            raise UnusableError("rejected answer is no text")
        return {"rejected": to_text(rejected)}
    asked, text = list_answers(read_turns(rejected)[0])[-1]
    if [turn[:2] for turn in asked] != [turn[:2] for turn in earlier]:
        raise UnusableError("chosen and rejected answer different prompts")
    return {"rejected": text}


def _read_answers(answers: Any) -> Any:
    """Read a text, or a list of the texts of several people."""
    if not isinstance(answers, list):
        if not is_plain(answers):
            raise UnusableError("answer is no text")
        return to_text(answers)
    texts = [one.get(ANSWER) if isinstance(one, dict) else one for one in answers]
    if not all(map(is_plain, texts)):
        raise UnusableError("answer is no text")
    return [to_text(text) for text in texts]


def _read_pictures(record: Mapping[str, Any], inside: list[Any], base: str) -> list[Row]:
    """Read a record's pictures: those of a list or the only one, and those of further columns; else those inside."""
    given = _find(record, PICTURES) or inside
    listed = given if isinstance(given, list) else [given]
    there = [one for one in listed if one is not None]
    further = [record.get(name) for name in PICTURE_COLUMNS[1:]]
    if len(there) + sum(one is not None for one in further) > MOST_PICTURES:
        raise UnusableError(f"more than {MOST_PICTURES} pictures")
    found = [_read_picture(one, base) for one in [*(listed if len(there) > 1 else there or [None]), *further]]
    pictures = [picture for picture in found if picture is not None]
    if None in found[: len(pictures)]:
        raise UnusableError("a picture before others is missing")
    return pictures


def _read_picture(picture: Any, base: str) -> Row | None:
    """Read a picture: bytes, a path, or a struct of both; None where there is none."""
    if picture is LEFT_OUT:
        return UNREAD
    if isinstance(picture, bytes):
        return {"bytes": picture, "path": None}
    encoded, path = (picture.get("bytes"), picture.get("path")) if isinstance(picture, dict) else (None, picture)
    if not isinstance(encoded, bytes | None) or not isinstance(path, str | None):
        raise UnusableError("image is no picture and no path")
    path = to_text(path)
    if path and base and not encoded and not path.startswith(("data:", *INLINE)):
        path = str(PurePath(base, path))
    return {"bytes": encoded, "path": path} if encoded or path else None


def _name_folder(path: str | None, level: int) -> str | None:
    """Name a folder of a picture's path, by its level from the top (1, 2, …) or from the picture (-1, -2, …).

    >>> _name_folder("north/2024/a.png", 1), _name_folder("north/2024/a.png", -1), _name_folder("a.png", 1)
    ('north', '2024', None)
    """
    folders = [name for name in PurePath(path or "").parts[:-1] if name != os.sep]
    place = level - 1 if level > 0 else level
    return folders[place] if -len(folders) <= place < len(folders) else None
