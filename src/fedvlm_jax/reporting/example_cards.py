"""Cards of examples: a test picture, its question and right answer, and what each model says, for both pages."""

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm_jax.data.safe_paths import OutsideError, read_below
from fedvlm_jax.errors import UserError
from fedvlm_jax.training.run_dir.validated_files import EXAMPLE_MODELS, EXAMPLES, check_examples, read_json
from fedvlm_jax.utils.untrusted_text import escape_markdown

__all__ = ["Card", "read_cards", "to_html_cards", "to_markdown_cards"]

PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG begins."""

MOST_BYTES = 2**20
"""Bytes of a picture at most; ours have some 25 KiB."""

LONG = 240
"""Texts are cut to so many characters; the run's folder has them whole."""


@dataclass(frozen=True)
class Card:
    """One example.

    Attributes:
        client: whose test example it is.
        picture: the file of its picture, a PNG.
        content: what is in that file.
        question, answer: as they stand in the data.
        said: who, what, and how good it is: "right", "wrong" or the share of words that it has in common.
    """

    client: str
    picture: Path
    content: bytes
    question: str
    answer: str
    said: tuple[tuple[str, str, str], ...]


def read_cards(folder: Path) -> tuple[list[Card], dict[str, int]]:
    """A run's examples, and client -> among how many test examples they were chosen; nothing where it stored none.

    Raises:
        UserError: the file is damaged, or names a picture that lies elsewhere.
    """
    path = folder / EXAMPLES
    if not path.is_file():
        return [], {}
    stored = read_json(path)
    check_examples(path, stored)
    cards = [
        Card(
            entry["client"],
            folder / entry["picture"],
            content,
            entry["question"],
            entry["answer"],
            tuple(
                (name, entry["answers"][model]["text"], _judge(entry["answers"][model]))
                for model, name in EXAMPLE_MODELS.items()
                if model in entry["answers"]
            ),
        )
        for entry in stored["examples"]
        if (content := _read_picture(folder, entry["picture"], path)) is not None
    ]
    return cards, dict(stored["looked_at"])


def _read_picture(folder: Path, name: str, listed: Path) -> bytes | None:
    """The PNG `name` below a run's folder; None where it is gone.

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


def _judge(answer: dict[str, Any]) -> str:
    if answer["exact_match"] == 1:
        return "right"
    return f"token F1 {100 * answer['token_f1']:.0f} %" if answer["token_f1"] else "wrong"


SIGNS = {"right": "✓", "wrong": "✗"}
"""A verdict's sign, which needs no colour; anything between has another."""


def _mark(verdict: str) -> str:
    return f"{SIGNS.get(verdict, '≈')} {verdict}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONG else text[: LONG - 1].rstrip() + "…"


def _escape(text: str) -> str:
    return escape_markdown(_cut(text))


def to_html_cards(cards: Sequence[Card], note: str) -> str:
    """A grid of cards; the pictures are part of the text."""
    return (
        f'<div class="cards">{"".join(map(_write_card, cards))}</div><p class=note>{html.escape(note)}</p>'
        if cards
        else ""
    )


def _write_card(card: Card) -> str:
    picture = base64.b64encode(card.content).decode("ascii")
    label = html.escape(f"Test picture of {card.client}", quote=True)
    rows = [f'<dt>right answer</dt><dd dir="auto"><b>{html.escape(_cut(card.answer))}</b></dd>']
    for who, text, verdict in card.said:
        kind = verdict if verdict in ("right", "wrong") else "partly"
        said = html.escape(_cut(text)) or "<i>(nothing)</i>"
        mark = f'<span><i class="{kind}">{SIGNS.get(verdict, "≈")}</i> {verdict}</span>'
        rows.append(f'<dt>{who}</dt><dd dir="auto">{said} {mark}</dd>')
    return (
        f'<article><img alt="{label}" src="data:image/png;base64,{picture}"><p class=sub>{html.escape(card.client)}</p>'
        f'<p dir="auto">{html.escape(_cut(card.question))}</p><dl>{"".join(rows)}</dl></article>'
    )


def to_markdown_cards(cards: Sequence[Card], note: str, folder: Path) -> str:
    """The same as a list, with pictures as files relative to `folder`."""
    blocks = []
    for card in cards:
        said = "".join(
            f"\n  - {who}: {_escape(text) or '(nothing)'} ({_mark(verdict)})" for who, text, verdict in card.said
        )
        picture = Path(os.path.relpath(card.picture, folder)).as_posix()
        blocks.append(
            f"- ![Test picture of {_escape(card.client)}]({picture}) {_escape(card.client)}: {_escape(card.question)}"
            f"\n  - right answer: {_escape(card.answer)}{said}"
        )
    return "\n".join([*blocks, "", note])
