"""Cards of examples: a test picture, its question and right answer, and what each model answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm_jax.data.safe_paths import OutsideError, read_below
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.validated_files import EXAMPLE_MODELS, EXAMPLES, EXAMPLES_FILE, read_json

PNG = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG."""

MOST_BYTES = 2**20
"""Bytes of a picture at most; ours have some 25 KiB."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer.

    Attributes:
        model: in words.
        text: the answer.
        verdict: "right", "wrong" or the share of words in common with the right answer.
        sign: the verdict's sign, which needs no colour.
    """

    model: str
    text: str
    verdict: str
    sign: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """An example.

    Attributes:
        client: whose test example it is.
        picture: the file of its picture, a PNG.
        content: of that file.
        question, answer: as they stand in the data.
        answers: of the models.
    """

    client: str
    picture: Path
    content: bytes
    question: str
    answer: str
    answers: tuple[Answer, ...]


def read_cards(folder: Path) -> tuple[list[Card], dict[str, int]]:
    """Read a run's examples, and client -> among how many test examples they were chosen; nothing where it has none.

    Raises:
        UserError: the file is damaged, or names a picture that lies elsewhere.
    """
    path = folder / EXAMPLES
    if not path.is_file():
        return [], {}
    stored = read_json(path, EXAMPLES_FILE)
    cards = [
        Card(
            client=entry["client"],
            picture=folder / entry["picture"],
            content=content,
            question=entry["question"],
            answer=entry["answer"],
            answers=tuple(
                _judge(name, entry["answers"][model])
                for model, name in EXAMPLE_MODELS.items()
                if model in entry["answers"]
            ),
        )
        for entry in stored["examples"]
        if (content := _read_picture(folder, entry["picture"], path)) is not None
    ]
    return cards, dict(stored["looked_at"])


def _read_picture(folder: Path, name: str, listed: Path) -> bytes | None:
    """Read the PNG `name` below a run's folder; None where it is gone.

    Raises:
        UserError: it lies elsewhere or is no PNG; a report would pass it on to whoever reads the page.
    """
    try:
        content = read_below(name, [folder], MOST_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, OutsideError, ValueError):  # ValueError: a name with NUL
        content = b""
    if not content.startswith(PNG):
        raise UserError(
            f"{listed}: picture {name!r} is no PNG of at most {MOST_BYTES >> 20} MiB below {folder}; only such are put "
            "into a report. Remove the file, or the entry, if the folder is yours."
        )
    return content


def _judge(model: str, answer: Mapping[str, Any]) -> Answer:
    if answer["exact_match"] == 1:
        verdict, sign = "right", "✓"
    elif answer["token_f1"]:
        verdict, sign = f"token F1 {100 * answer['token_f1']:.0f} %", "≈"
    else:
        verdict, sign = "wrong", "✗"
    return Answer(model=model, text=answer["text"], verdict=verdict, sign=sign)
