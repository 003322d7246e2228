"""Rows of images, question and answer, addressed by number; nothing is loaded whole.

A table is mapped from Arrow files (`arrow_cache.py` writes and maps them). Source of the schema: the card of
openbmb/RLAIF-V-Dataset (arXiv 2405.17220); `client`, `split`, `language` and `question_client` are this project's.
"""

import base64
import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.types as is_a
from jaxtyping import Int

from fedvlm_jax.data.config import INLINE, MAX_IMAGE_PIXELS, PICTURE_COLUMNS
from fedvlm_jax.data.image_decoding import DECODING, BrokenImageError
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.conversations import UNREADABLE
from fedvlm_jax.utils.cache_folders import Hold
from fedvlm_jax.utils.digests import DIGEST_SIZE, digest_parts
from fedvlm_jax.utils.files import read_plain, write_bytes
from fedvlm_jax.utils.safe_paths import OutsideError, read_below

# Why an image that goes by a name is not read.
LOST = "image file cannot be read"
OUTSIDE = "image file outside of the data's folder (--data.image-root allows another)"

LONGEST_NAME = 80  # characters of an image's name that a message shows

FACTS = f"fedvlm-jax-images-{DECODING}.npz"  # the file of `ImageFacts`, beside the Arrow files

RowNumbers = Sequence[int] | np.ndarray


@dataclass(eq=False)
class ImageFacts:
    """Digest of each encoded image, and the images that were decoded without a fault, by their numbers.

    The image of place p in row r of a table of N rows has the number p · N + r, so a row's first has the row's.
    """

    file: Path | None = None  # keeps them; None: in memory only
    digests: dict[int, bytes] = field(default_factory=dict, repr=False)
    sound: set[int] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, file: Path) -> "ImageFacts":
        """Read what an earlier run kept; nothing where the file is missing or damaged."""
        return cls(file, *_read_facts(file))

    def save(self, lasting: Callable[[int], bool]) -> None:
        """Keep facts of the images that are `lasting`: others are separate files, which may change."""
        if self.file is None:
            return
        digests, sound = _read_facts(self.file)  # again: what another process has written since stays
        digests |= {number: digest for number, digest in self.digests.items() if lasting(number)}
        sound |= {number for number in self.sound if lasting(number)}
        out = io.BytesIO()
        rows = np.asarray(list(digests), np.int64)
        stacked = np.frombuffer(b"".join(digests.values()), np.uint8).reshape(-1, DIGEST_SIZE)
        np.savez(out, rows=rows, digests=stacked, sound=np.asarray(sorted(sound), np.int64))
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_bytes(self.file, digest_parts([out.getvalue()]) + out.getvalue())


@dataclass(frozen=True, eq=False)
class ImageLocations:
    """Where the encoded images of N rows lie: a row's file, and for V places the bytes' start and count (0: none)."""

    files: tuple[Path, ...]
    file: Int[np.ndarray, " rows"]
    start: Int[np.ndarray, "rows pictures"]
    length: Int[np.ndarray, "rows pictures"]

    def read(self, row: int, place: int = 0) -> bytes:
        """Read the bytes of a row's image."""
        if self.length[row, place] == 0:
            return b""
        with self.files[self.file[row]].open("rb", buffering=0) as file:
            file.seek(int(self.start[row, place]))
            return file.read(int(self.length[row, place]))


@dataclass(frozen=True, eq=False)
class Table:
    """A table of rows on disk."""

    name: str  # the data set's registered name, or what was given
    data: pa.Table  # memory-mapped or small
    folder: Path  # where relative image paths begin, and below which every image file must lie
    locations: ImageLocations | None = field(default=None, repr=False)  # of images in mapped files
    facts: ImageFacts = field(default_factory=ImageFacts, repr=False)  # only `unique_images.py` fills it
    revision: str | None = None  # the commit that a set from the hub was fetched at
    digest: str = ""  # of the contents of its files; "" where it was made in memory
    image_root: Path | None = None  # a second folder for image files, looked into after the first
    hold: Hold | None = field(default=None, repr=False)  # keeps mapped files in our cache from being removed
    form: str = ""  # of people's own data, as found
    max_image_pixels: int = MAX_IMAGE_PIXELS  # images of more pixels are not decoded

    def __len__(self) -> int:
        return self.data.num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.data.column_names)

    def read_text(self, column: str, rows: RowNumbers | None = None) -> list[str | None]:
        """Read the texts of a column, for the given rows [N] or for all; numbers become text, nulls stay None.

        Bytes that are no UTF-8 become `UNREADABLE`. Of several answers it is the most frequent, of these the first.

        Raises:
            UserError: there is no such column.
        """
        return [text for chunk in self._take(column, rows) for text in _list_texts(chunk)]

    def read_stripped(self, column: str, rows: RowNumbers) -> list[str]:
        """Read texts without the spaces around them, as `read_text` does; empty where a row has none."""
        return [(text or "").strip() for text in self.read_text(column, rows)]

    def read_answers(self, rows: RowNumbers | None = None) -> list[tuple[str, ...]]:
        """Read all answers of each of the given rows [N], equal ones as often as given; empty ones do not count."""
        cells = [cell for chunk in self._take("chosen", rows) for cell in _list_cells(chunk)]
        return [tuple(text.strip() for text in cell if text and text.strip()) for cell in cells]

    @property
    def has_several_answers(self) -> bool:
        """True where rows may have the answers of several people."""
        return is_a.is_list(self.data.schema.field("chosen").type)

    def _take(self, column: str, rows: RowNumbers | None) -> list[pa.Array]:
        if column not in self.columns:
            raise UserError(f"{self.name} has no column {column!r}; it has: {', '.join(self.columns)}.")
        values = self.data.column(column)
        if rows is None:
            return values.chunks
        # `pa.array` does the same, but imports pandas, a third of a second.
        numbers = pa.py_buffer(np.ascontiguousarray(rows, np.int64))
        return values.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, numbers])).chunks

    @property
    def most_pictures(self) -> int:
        """Number V of images that a row may have, by the columns."""
        return max(1, sum(1 for _ in itertools.takewhile(self.columns.__contains__, PICTURE_COLUMNS)))

    def count_pictures(self, rows: RowNumbers) -> Int[np.ndarray, " rows"]:
        """Count the images of each of the given rows [N], up to its last one; 1 where it has none."""
        counts = np.ones(len(rows), np.int64)
        for place in range(1, self.most_pictures):
            there = np.asarray(self.data.column(PICTURE_COLUMNS[place]).is_valid(), bool)
            counts[there[np.asarray(rows, np.int64)]] = place + 1
        return counts

    def read_image(self, row: int, place: int = 0) -> bytes:
        """Read a row's encoded image at a place, 0 the first: from the table, or the file that it names.

        Raises:
            BrokenImageError: there is none.
        """
        if self.locations is not None and (found := self.locations.read(int(row), place)):
            return found
        cell = self.data.column(PICTURE_COLUMNS[place])[int(row)]
        encoded, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, pa.StructScalar) else (None, cell)
        found = None if encoded is None else encoded.as_py()
        try:
            if not found and path is not None and (name := path.as_py()):
                found = _read_inline(name) or read_below(name, self._image_folders)
        except OutsideError as error:
            raise BrokenImageError(OUTSIDE) from error
        except (OSError, ValueError) as error:  # the latter from a name with a NUL, or one that is no UTF-8
            raise BrokenImageError(LOST) from error
        if not found:
            raise BrokenImageError("no image")
        return found

    def describe_lookup(self, row: int, place: int = 0) -> str:
        """Say by which name a row's image was looked for, and where; empty where it does not go by a name."""
        try:
            cell = self.data.column(PICTURE_COLUMNS[place])[int(row)].as_py()
        except UnicodeDecodeError:  # a name that is no UTF-8 has not been looked for
            return ""
        name = cell.get("path") if isinstance(cell, dict) else cell
        if not isinstance(name, str) or name in ("", UNREADABLE) or self.is_embedded(row, place):
            return ""
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        return f"looked for {shown!r} in {' and '.join(repr(str(place.absolute())) for place in self._image_folders)}"

    @property
    def _image_folders(self) -> tuple[Path, ...]:
        return (self.folder,) if self.image_root is None else (self.folder, self.image_root)

    def is_embedded(self, row: int, place: int = 0) -> bool:
        """Tell whether the image's bytes lie in a mapped file, where nobody changes them."""
        return self.locations is not None and bool(self.locations.length[row, place])


def _read_inline(text: str) -> bytes | None:
    """Decode a picture that is the text itself, as a data URL or in base64; None where the text is a name."""
    if text.startswith("data:") and ";base64," in text[:LONGEST_NAME]:
        text = text.partition(";base64,")[2]
    elif not text.startswith(INLINE) or len(text) <= LONGEST_NAME:
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # many encoders break the lines
    except ValueError:
        return None


def _list_texts(chunk: pa.Array) -> list[str | None]:
    if is_a.is_list(chunk.type):
        return [_choose(cell) for cell in _list_cells(chunk)]
    if is_a.is_dictionary(chunk.type):  # its words are made once, not once per row
        words = _list_texts(chunk.dictionary)
        return [None if code is None else words[code] for code in chunk.indices.to_pylist()]
    try:
        # NaN, which is not itself, is how other programs write that there is no number.
        return [None if value is None or value != value else str(value) for value in chunk.to_pylist()]
    except UnicodeDecodeError:
        encoded = chunk.cast("large_binary").to_pylist()
        return [None if value is None else _read_utf8(value) for value in encoded]


def _read_utf8(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return UNREADABLE


def _list_cells(chunk: pa.Array) -> list[list[str | None]]:
    """List every row's texts: those of its list, or its only one."""
    if not is_a.is_list(chunk.type):
        return [[text] for text in _list_texts(chunk)]
    texts = _list_texts(chunk.flatten())
    edges = np.cumsum([0, *chunk.value_lengths().fill_null(0).to_pylist()]).tolist()
    return [texts[start:end] for start, end in itertools.pairwise(edges)]


def _choose(answers: Sequence[str | None]) -> str | None:
    """Choose the most frequent of several answers, of equally frequent ones the first; None of none."""
    if UNREADABLE in answers:  # nobody knows which is the most frequent
        return UNREADABLE
    counted = Counter(text.strip() for text in answers if text and text.strip())
    return max(counted, key=counted.__getitem__) if counted else None


def _read_facts(file: Path) -> tuple[dict[int, bytes], set[int]]:
    content = b""
    with contextlib.suppress(OSError):
        content = read_plain(file)
    # The arrays come after a digest of them, which a file that was cut short or changed does not fit.
    if len(content) <= DIGEST_SIZE or digest_parts([content[DIGEST_SIZE:]]) != content[:DIGEST_SIZE]:
        return {}, set()
    with np.load(io.BytesIO(content[DIGEST_SIZE:]), allow_pickle=False) as stored:
        digests = (digest.tobytes() for digest in stored["digests"])
        return dict(zip(stored["rows"].tolist(), digests, strict=True)), set(stored["sound"].tolist())
