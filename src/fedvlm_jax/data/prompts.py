"""What a row asks: a text or the turns of a conversation, and the pictures in it, as processors are given it."""

from dataclasses import dataclass
from typing import NamedTuple

from fedvlm_jax.records.conversations import Turn


class Tiles(NamedTuple):
    """Rows and columns of tiles that a picture is cut into beside the whole of it; none where it stays whole.

    >>> Tiles(3, 4).views
    13
    """

    rows: int = 0
    columns: int = 0

    @property
    def views(self) -> int:
        """The tiles of the picture, and the whole of it, are what the vision tower sees."""
        return self.rows * self.columns + 1


class Grid(NamedTuple):
    """Rows and columns of the image tokens of a picture that keeps its proportions, and has as many as these make.

    >>> Grid(3, 4).tokens
    12
    """

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Image tokens of the picture."""
        return self.rows * self.columns

    @property
    def views(self) -> int:
        """The whole of the picture is all that the vision tower sees of it."""
        return 1


@dataclass(frozen=True)
class Prompt:
    """What a row asks.

    Attributes:
        text: the question; of a conversation, all that is said before the answer.
        turns: the conversation, for processors that read turns; none where the question is all of it.
        pictures: how each picture is cut, or its grid, in their order. Where turns are not read, pictures stand before
            the text.
    """

    text: str
    turns: tuple[Turn, ...] = ()
    pictures: tuple[Tiles | Grid, ...] = (Tiles(),)

    @property
    def views(self) -> int:
        """Number of what the vision tower sees of all pictures."""
        return sum(picture.views for picture in self.pictures)

    @property
    def said(self) -> tuple[Turn, ...]:
        """The turns; a question alone is one that pictures stand before."""
        return self.turns or (Turn("user", self.text, (*[None] * len(self.pictures), self.text)),)

    @property
    def characters(self) -> int:
        """Length of all its texts."""
        return sum(len(part) for turn in self.said for part in turn.content if part)


def to_prompt(asked: str | Prompt) -> Prompt:
    """Return a prompt; a text alone is asked of one whole picture."""
    return Prompt(asked) if isinstance(asked, str) else asked
