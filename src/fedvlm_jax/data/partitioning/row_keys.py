"""Keys that rows differ in: the text columns, and fields of RLAIF-V's column `origin_split`.

The card of openbmb/RLAIF-V-Dataset (arXiv 2405.17220) says what that column holds, not how its fields are called, and
older revisions write it in other ways. So it is read as JSON, else as a Python literal, else as plain text, and fields
are found by parts of their names.
"""

import ast
import json
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedvlm_jax.data.config import FAULT, PICTURE_COLUMNS, TURNS
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.conversations import UNREADABLE

UNKNOWN = "unknown"  # where a derived key has no value
DERIVED = ("question_type", "generator", "labeller")  # the keys that `origin_split` holds

# What the card names; looked for where `origin_split` has no structure.
QUESTION_TYPES = ("detailed description", "question answering")
LONGEST = 10_000  # characters beyond which a text is no longer taken for a literal


def list_keys(table: Table) -> tuple[str, ...]:
    """List the keys that a table can be cut by: its columns but the images, and what `origin_split` gives."""
    columns = tuple(column for column in table.columns if column not in (*PICTURE_COLUMNS, FAULT, TURNS))
    derived = DERIVED if "origin_split" in columns else ()
    return columns + tuple(key for key in derived if key not in columns)


def read_key(table: Table, key: str, rows: Sequence[int] | np.ndarray | None = None) -> list[str | None]:
    """Read every row's value of a key, for the given rows [N] or for all; spaces around it do not count.

    Values are in Unicode's form NFC: the same letters are the same value, however they were typed. A row without text,
    or with bytes that are no UTF-8, gives None, a derived key "unknown". A column wins over a derived key of its name.

    Raises:
        UserError: the table has no such key.
    """
    if key not in list_keys(table):
        raise UserError(f"{table.name} has no key {key!r} to tell rows apart by; it has {', '.join(list_keys(table))}.")
    if key in table.columns:
        texts = table.read_text(key, rows)
        tidied = {text: unicodedata.normalize("NFC", text.strip()) for text in set(texts) if text}
        valued = {text: tidy for text, tidy in tidied.items() if tidy not in ("", UNREADABLE)}
        return [valued.get(text) if text else None for text in texts]
    texts = table.read_text("origin_split", rows)
    parsed = {text: parse_origin_split(text)[key] for text in set(texts)}
    return [parsed[text] for text in texts]


def parse_origin_split(text: str | None) -> dict[str, str]:
    """Read one `origin_split`: every key of `DERIVED` -> its value, or "unknown".

    >>> parse_origin_split('{"type": "question_answering", "infer": "LLaVA"}')
    {'question_type': 'question answering', 'generator': 'LLaVA', 'labeller': 'unknown'}
    """
    text = (text or "").strip()
    fields = _read_fields(text)
    if fields is None:
        named = [kind for kind in QUESTION_TYPES if kind in _plain(text)]
        return dict.fromkeys(DERIVED, UNKNOWN) | ({"question_type": named[0]} if len(named) == 1 else {})
    kind = _find(fields, ("type",))
    labeller = _find(fields, ("label", "feedback", "judge", "annotat"))
    others = {name: value for name, value in fields.items() if name not in (kind, labeller)}
    generator = _find(others, ("generat", "infer", "answer", "model"))
    return {
        "question_type": _plain(fields[kind]) if kind else UNKNOWN,
        "generator": fields[generator] if generator else UNKNOWN,
        "labeller": fields[labeller] if labeller else UNKNOWN,
    }


def _read_fields(text: str) -> dict[str, str] | None:
    """Read the fields of a JSON object or Python dict whose value is a text or a number; None if it is neither."""
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers if text.startswith("{") and len(text) <= LONGEST else ():
        try:
            with warnings.catch_warnings(action="ignore"):  # a literal with odd escapes is still one
                value = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, Mapping):
            stated = {
                _encodable(str(name)): " ".join(_encodable(str(v)).split())
                for name, v in value.items()
                if isinstance(v, (str, int))
            }
            return {name: value for name, value in stated.items() if value}
    return None


def _find(fields: Mapping[str, str], parts: Sequence[str]) -> str | None:
    """Find the first field whose name has the first of the parts that any has."""
    return next((name for part in parts for name in fields if part in name.casefold()), None)


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair, which no file or terminal takes.
    return text.encode("utf-8", "replace").decode()


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("_", " ").replace("-", " ").split())
