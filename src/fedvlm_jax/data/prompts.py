"""What a row asks: a text or the turns of a conversation, and the pictures in it, as processors are given it."""

import json
from dataclasses import dataclass
from typing import NamedTuple

from fedvlm_jax.errors import UserError

ROLES = ("system", "user", "assistant")


class Tiles(NamedTuple):
    """Rows and columns of tiles that a picture is cut into beside the whole of it; none where it stays whole.

    >>> Tiles(3, 4).views
    13
    """

    rows: int = 0
    columns: int = 0

    @property
    def views(self) -> int:
        """What the vision tower sees of the picture: its tiles, and the whole of it."""
        return self.rows * self.columns + 1


class Turn(NamedTuple):
    """Who says what: texts in their order, None in the place of a picture."""

    role: str
    parts: tuple[str | None, ...]


@dataclass(frozen=True)
class Prompt:
    """What a row asks.

    Attributes:
        text: the question; of a conversation, all that is said before the answer.
        turns: the conversation, for processors that read turns; none where the question is all of it.
        pictures: how each picture is cut, in their order. Where turns are not read, pictures stand before the text.
    """

    text: str
    turns: tuple[Turn, ...] = ()
    pictures: tuple[Tiles, ...] = (Tiles(),)

    @property
    def views(self) -> int:
        """Number of what the vision tower sees of all pictures."""
        return sum(picture.views for picture in self.pictures)

    @property
    def said(self) -> tuple[Turn, ...]:
        """The turns; a question alone is one that pictures stand before."""
        return self.turns or (Turn("user", (*[None] * len(self.pictures), self.text)),)


def to_prompt(asked: str | Prompt) -> Prompt:
    """Return a prompt; a text alone is asked of one whole picture."""
    return Prompt(asked) if isinstance(asked, str) else asked


def parse_turns(text: str, pictures: int) -> tuple[Turn, ...]:
    """Read turns from the JSON of a table's column, as `records.conversations.write_turns` writes it.

    Where no turn says where the pictures stand, they stand first in the first turn of the user.

    Raises:
        UserError: it is something else, or has another number of pictures.

    >>> parse_turns('[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]', 1)
    (Turn(role='system', parts=('Be brief.',)), Turn(role='user', parts=(None, 'What is it?')))
    """
    try:
        turns = [Turn(message["role"], _read_parts(message["content"])) for message in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        turns = []
    if not turns or not {turn.role for turn in turns} <= {*ROLES}:
        raise UserError("turns that are no messages")
    placed = sum(turn.parts.count(None) for turn in turns)
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if pictures and not placed and first is not None:
        turns[first] = Turn("user", (*[None] * pictures, *turns[first].parts))
    elif placed != pictures:
        raise UserError(f"turns with places for {placed} pictures")
    return tuple(turns)


def _read_parts(content: object) -> tuple[str | None, ...]:
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        raise TypeError
    return tuple(None if part["type"] == "image" else str(part["text"]) for part in content)
