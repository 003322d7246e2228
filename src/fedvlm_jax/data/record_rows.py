"""A record of any form made the rows of a table: picture, question, answers, and the plain values beside them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fedvlm_jax.data.config import FAULT, INLINE, TURNS
from fedvlm_jax.data.forms.base import Reading
from fedvlm_jax.records.conversations import (
    Turn,
    UnusableError,
    is_messages,
    is_plain,
    join_turns,
    list_answers,
    read_turns,
    to_text,
    write_turns,
)
from fedvlm_jax.records.files import Part, Record

Row = dict[str, Any]

# Columns that say the same: one that `--data.columns` names counts, else the first that has a value.
PICTURES = ("image", "images", "file_name", "file_names")
QUESTIONS = ("question", "prompt")
ANSWERS = ("chosen", "messages", "conversations")
ANSWER = "answer"  # the field of an answer's object that holds its text, as VQAv2 has it
READ = frozenset((*PICTURES, *QUESTIONS, *ANSWERS, "rejected", "idx", "id", FAULT, TURNS))


def make_rows(record: Record, part: Part, reading: Reading) -> list[Row]:
    """Make the rows of a record; one of a record that cannot be used, with the reason in `FAULT`."""
    if isinstance(record, str):
        return [{FAULT: record}]
    record = rename(record, reading.columns)
    plain = {name: value for name, value in record.items() if name not in READ and is_plain(value)}
    row: Row = {name: to_text(value) for name, value in plain.items() if to_text(name) == name}  # else it is no UTF-8
    if named := [record[name] for name in ("idx", "id") if name in record]:
        row["idx"] = to_text(named[0])
    if part.split and row.get("split") is None:
        row["split"] = to_text(part.split)
    try:
        examples, inside = _read_examples(record, reading)
        picture = _read_picture(_find(record, PICTURES) or inside, part.base)
    except UnusableError as error:
        return [row | {FAULT: str(error)}]
    row["image"] = picture
    if reading.client_folder is not None:
        row["client"] = _name_folder(picture["path"] if picture else None, reading.client_folder)
    rows = [row | example for example in examples]
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


def _read_examples(record: Mapping[str, Any], reading: Reading) -> tuple[list[Row], list[Any]]:
    """Read what a record asks and answers: questions with answers, and pictures that stand in its messages."""
    prompt, answers = _find(record, QUESTIONS), _find(record, ANSWERS)
    before, pictures = read_turns(prompt) if is_messages(prompt) else (_ask(prompt), [])
    talks = answers is not None and _find(record, ANSWERS[:1]) is None
    if not talks and not is_messages(answers):
        return [_make_example(before, _read_answers(answers), _read_rejected(record, []), reading)], pictures
    turns, more = read_turns(answers)
    answered = list_answers(turns)
    if talks:
        chosen = answered if reading.each else answered[-1:]
        return [_make_example(earlier, text, {}, reading) for earlier, text in chosen], more
    earlier, text = answered[-1]
    # Some sets have the prompt in both answers, with or without a column of its own.
    before = list(earlier) if any(turn.role == "user" for turn in earlier) else [*before, *earlier]
    return [_make_example(before, text, _read_rejected(record, earlier), reading)], pictures or more


def _ask(prompt: Any) -> list[Turn]:
    if not is_plain(prompt):
        raise UnusableError("question is no text")
    text = to_text(prompt)
    return [] if text is None else [Turn("user", text)]


def _make_example(turns: Sequence[Turn], chosen: Any, rejected: Row, reading: Reading) -> Row:
    if not any(turn.role == "user" and turn.text.strip() for turn in turns) and reading.question:
        turns = [*(turn for turn in turns if turn.text.strip()), Turn("user", reading.question)]
    example: Row = {"question": join_turns(turns), "chosen": chosen, **rejected}
    return example | ({TURNS: write_turns(turns)} if len(turns) > 1 else {})


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
    if [*asked] != [*earlier]:
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


def _read_picture(value: Any, base: str) -> dict[str, Any] | None:
    """Read a picture: bytes, a path, a struct of both, or a list of one of these; None where there is none."""
    several = [one for one in value if one is not None] if isinstance(value, list) else [value]
    if len(several) > 1:
        raise UnusableError("several pictures")
    picture = several[0] if several else None
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
