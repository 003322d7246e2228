"""A question and its pictures: looked at before a model is loaded, and made the rows of a table.

A table of questions goes the way of all data: its pictures are decoded, its prompts written and tokenised as those of
the rows that a run is evaluated on. No heavy package is imported before one is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvlm_jax.data.config import MAX_IMAGE_PIXELS, MOST_PICTURES, PICTURE_COLUMNS
from fedvlm_jax.data.image_decoding import BrokenImageError, decode_picture
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError, check_utf8, describe_os_error, format_count
from fedvlm_jax.records.files import PICTURE
from fedvlm_jax.utils.safe_paths import OutsideError, read_below

MOST_BYTES = 2**26
"""Bytes of a picture's file at most: 64 MiB."""

MOST_CHARACTERS = 20_000
"""Characters of a question at most; how many tokens a prompt may have is the model's to say."""


@dataclass(frozen=True)
class Shown:
    """Pictures to ask about.

    Attributes:
        rows: of each question, the names of its pictures.
        folder: below it are the pictures that are read one by one; None where they are all in `contents`.
        contents: the bytes of the pictures of an only question.
        broken: names of pictures in the folder that cannot be read -> why.
    """

    rows: tuple[tuple[str, ...], ...]
    folder: Path | None = None
    contents: tuple[bytes, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()


def check_question(text: str) -> str:
    """Return a question without the white space around it.

    Raises:
        UserError: nothing is left, it is longer than anybody asks, or it is no text that can be written.
    """
    text = text.strip()
    if not text:
        raise UserError("the question is empty: say what to ask, in quotes")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"the question has {len(text):,} characters; {MOST_CHARACTERS:,} are the most")
    check_utf8("the question", text)
    return text


def look_at(paths: Sequence[Path], max_pixels: int = MAX_IMAGE_PIXELS) -> Shown:
    """Read pictures of one question, or list those of a folder, each of which is asked about; decode all, once.

    Raises:
        UserError: one is missing or broken, there are too many, none is in the folder, or the folder is not alone.
    """
    if folders := [path for path in paths if path.is_dir()]:
        if len(paths) > 1:
            raise UserError(f"--image {folders[0]} is a folder, about each picture of which is asked: give it alone")
        return _look_into(folders[0], max_pixels)
    if len(paths) > MOST_PICTURES:
        raise UserError(f"{len(paths)} pictures of one question; {MOST_PICTURES} are the most")
    contents = tuple(_read(path, max_pixels) for path in paths)
    return Shown((tuple(map(str, paths)),), contents=contents)


def _read(path: Path, max_pixels: int) -> bytes:
    try:
        if not path.is_file():  # a pipe would be read for ever
            raise UserError(f"--image {path}: {'it is no file' if path.exists() else 'there is no such file'}")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"--image {path}: {size >> 20} MiB; {MOST_BYTES >> 20} MiB are the most")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--image {path}: {describe_os_error(OSError(error.errno, error.strerror))}") from None
    check_picture(content, f"--image {path}", max_pixels)
    return content


def check_picture(content: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Refuse a picture that cannot be decoded.

    Raises:
        UserError: with its name and the reason.

    >>> check_picture(b"GIF89a", "cat.gif")
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: cat.gif: broken or truncated image
    """
    try:
        decode_picture(content, max_pixels=max_pixels, quick=True)
    except BrokenImageError as error:
        raise UserError(f"{name}: {error}") from None


def _look_into(folder: Path, max_pixels: int) -> Shown:
    names = sorted(path.name for path in folder.iterdir() if PICTURE.fullmatch(path.name) and path.is_file())
    sound, broken = list[tuple[str, ...]](), list[tuple[str, str]]()
    for name in names:
        try:
            decode_picture(read_below(name, [folder], MOST_BYTES), max_pixels=max_pixels, quick=True)
            sound.append((name,))
        except (BrokenImageError, OSError, ValueError) as error:  # OutsideError, of a link that leads elsewhere, is one
            reason = "leads out of the folder" if isinstance(error, OutsideError) else str(error)
            broken.append((name, reason))
    if not sound:
        why = (
            f"none of its {format_count(len(names), 'picture')} can be read ({broken[0][1]})"
            if names
            else "no picture is in it"
        )
        raise UserError(f"--image {folder}: {why}")
    return Shown(tuple(sound), folder, broken=tuple(broken))


def make_table(question: str, shown: Shown, answer: str, max_pixels: int) -> Table:
    """Make the table of a question about pictures, a row for each time that it is asked.

    `answer` is one that the model could give: rows of a table have an answer, though here it counts for nothing.
    """
    import pyarrow as pa

    places = range(max(map(len, shown.rows)))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def cell(names: Sequence[str], place: int) -> dict[str, bytes | str | None] | None:
        if place >= len(names):
            return None
        given = shown.contents[place] if shown.folder is None else None
        return {"bytes": given, "path": names[place] if given is None else None}

    pictures = {PICTURE_COLUMNS[at]: pa.array([cell(names, at) for names in shown.rows], kind) for at in places}
    count = len(shown.rows)
    texts = {"question": pa.array([question] * count), "chosen": pa.array([answer] * count)}
    folder = Path() if shown.folder is None else shown.folder
    return Table("the question", pa.table({**pictures, **texts}), folder, max_image_pixels=max_pixels)
