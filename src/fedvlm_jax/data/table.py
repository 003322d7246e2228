"""Rows of image, question and answer from parquet, in RLAIF-V's columns; nothing is loaded whole.

A file, or a folder of shards, goes once through `datasets` into Arrow files in its on-disk cache (as large again as the
shards; in memory a few row groups at a time) and is mapped from there, so that a table of 14 GB costs address space and
no memory. The network is never asked. Columns are checked from the files' footers, before a single row is read.

Source of the schema: the card of openbmb/RLAIF-V-Dataset (arXiv 2405.17220); `client`, `split`, `language` and
`question_client` are this project's additions.
"""

import base64
import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedvlm_jax.data.arrow_images import Blobs, open_arrow
from fedvlm_jax.data.arrow_seals import check_seal, discard
from fedvlm_jax.data.config import MAX_IMAGE_PIXELS
from fedvlm_jax.data.image_decoding import DECODING, BrokenImageError
from fedvlm_jax.data.image_index import ImageFacts
from fedvlm_jax.data.safe_paths import OutsideError, read_below
from fedvlm_jax.data.sources.parquet import NEEDED, UNDERSTOOD, check_shards, convert_shards, find_folder
from fedvlm_jax.errors import UserError, find_machine_fault
from fedvlm_jax.utils.cache_folders import Hold, read_bound
from fedvlm_jax.utils.digests import digest_files

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from fedvlm_jax.data.config import DataOptions

__all__ = [
    "NEEDED",
    "UNDERSTOOD",
    "UNREADABLE",
    "BrokenImageError",
    "Table",
    "open_dataset",
    "read_parquet",
    "read_table",
]

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What stands for a text whose bytes are no UTF-8: nobody checks when parquet is written, and damage is not noticed."""

LOST = "image file cannot be read"
OUTSIDE = "image file outside of the data's folder (--data.image-root allows another)"
"""Why an image that goes by a name is not there."""

LONGEST_NAME = 80
"""Characters of an image's name that a message shows."""

INLINE = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How PNG, JPEG, GIF and WebP begin in base64."""

FACTS = f"fedvlm-jax-images-{DECODING}.npz"
"""The file beside the Arrow files that holds what is known about the images."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows on disk, addressed by number.

    Attributes:
        name: the data set's registered name, or the path that was given.
        data: the Arrow table behind it, memory-mapped or small.
        folder: where relative image paths begin, and below which every image file must lie.
        blobs: where the images' bytes lie, if that is in mapped files.
        facts: what is known about the images; only `images.py` fills it.
        revision: the commit that a set from the hub was fetched at.
        digest: of the contents of its files; "" where it was made in memory.
        image_root: a second folder for image files, looked into after the first.
        hold: what keeps mapped files in our cache from being removed.
        max_image_pixels: images of more pixels are not decoded.
    """

    name: str
    data: "pa.Table"
    folder: Path
    blobs: Blobs | None = field(default=None, repr=False)
    facts: ImageFacts = field(default_factory=ImageFacts, repr=False)
    revision: str | None = None
    digest: str = ""
    image_root: Path | None = None
    hold: Hold | None = field(default=None, repr=False)
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def __len__(self) -> int:
        return self.data.num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.data.column_names)

    def read_text(self, column: str, rows: "Sequence[int] | np.ndarray | None" = None) -> list[str | None]:
        """The texts of one column, for the given rows [N] or for all; numbers become text, nulls stay None.

        What is no UTF-8 becomes `UNREADABLE`. Of several answers it is the most frequent, of equally frequent ones the
        first.

        Raises:
            UserError: there is no such column.
        """
        return [text for chunk in self._take(column, rows) for text in _list_texts(chunk)]

    def read_answers(self, rows: "Sequence[int] | np.ndarray | None" = None) -> list[tuple[str, ...]]:
        """All answers to the question of each of the given rows [N], equal ones as often as they were given.

        Spaces around them do not count, nor do empty ones.
        """
        cells = [cell for chunk in self._take("chosen", rows) for cell in _list_cells(chunk)]
        return [tuple(text.strip() for text in cell if text and text.strip()) for cell in cells]

    @property
    def has_several_answers(self) -> bool:
        """May a row have the answers of several people?"""
        import pyarrow.types as is_a

        return is_a.is_list(self.data.schema.field("chosen").type)

    def _take(self, column: str, rows: "Sequence[int] | np.ndarray | None") -> "list[pa.Array]":
        if column not in self.columns:
            raise UserError(f"{self.name} has no column {column!r}; it has: {', '.join(self.columns)}.")
        values = self.data.column(column)
        return values.chunks if rows is None else values.take(_to_arrow(np.ascontiguousarray(rows, np.int64))).chunks

    def read_image(self, row: int) -> bytes:
        """The encoded bytes of one row's image, from the table or from the file it names.

        Raises:
            BrokenImageError: there are none.
        """
        import pyarrow as pa

        if self.blobs is not None and (found := self.blobs.read(int(row))):
            return found
        cell = self.data.column("image")[int(row)]
        encoded, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, pa.StructScalar) else (None, cell)
        if encoded is not None and (found := encoded.as_py()):
            return found
        try:
            if path is None or not (name := path.as_py()):
                raise BrokenImageError("no image")
            found = _read_inline(name) or read_below(name, self.image_folders)
        except BrokenImageError:
            raise
        except OutsideError as error:
            raise BrokenImageError(OUTSIDE) from error
        except (OSError, ValueError) as error:  # the latter from a name with a NUL, or one that is no UTF-8
            raise BrokenImageError(LOST) from error
        if not found:
            raise BrokenImageError("no image")
        return found

    def tell_image(self, row: int) -> str:
        """Say by which name a row's image was looked for, and where; empty where it does not go by a name."""
        cell = self.data.column("image")[int(row)].as_py()
        name = cell.get("path") if isinstance(cell, dict) else cell
        if not isinstance(name, str) or not name or self.is_embedded(row):
            return ""
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        return f"looked for {shown!r} in {' and '.join(repr(str(place.absolute())) for place in self.image_folders)}"

    @property
    def image_folders(self) -> tuple[Path, ...]:
        """The folders below which image files may lie."""
        return (self.folder,) if self.image_root is None else (self.folder, self.image_root)

    def is_embedded(self, row: int) -> bool:
        """Do the row's bytes lie in a mapped file, where nobody changes them?"""
        return self.blobs is not None and bool(self.blobs.length[row])


def read_table(source: "str | DataOptions") -> Table:
    """Open a named data set, a parquet file, or a folder of parquet shards.

    Args:
        source: a name that `registry.find_sets` knows, or a path; or the options that hold it, which also say where a
            set lies that does not ship. A name wins over a path; `./name` is always a path.

    Raises:
        UserError: neither such a name nor such a path, or the files do not hold what is needed.
    """
    from fedvlm_jax.data.config import DataOptions
    from fedvlm_jax.data.sources.registry import find_sets

    options = DataOptions(source=source) if isinstance(source, str) else source
    known = find_sets()
    if options.image_root is not None and not options.image_root.expanduser().is_dir():
        raise UserError(f"--data.image-root {options.image_root} is no folder; expected the one that holds the images.")
    table = known[options.source].read(options) if options.source in known else _read_path(options)
    root = options.image_root and options.image_root.expanduser()
    return dataclasses.replace(table, image_root=root, max_image_pixels=options.max_image_pixels)


def _read_path(options: "DataOptions") -> Table:
    from fedvlm_jax.data.sources.registry import find_sets

    path = Path(options.source).expanduser()
    if not path.exists():
        raise UserError(
            f"--data {options.source!r} is neither a named data set nor a path that exists; named sets are "
            f"{', '.join(sorted(find_sets()))}; else give a parquet file or a folder of parquet files."
        )
    return read_parquet(path)


def read_parquet(path: Path, name: str | None = None) -> Table:
    """Memory-map a parquet file or all `*.parquet` below a folder, in the order of their names.

    Raises:
        UserError: no parquet there, a file that is none, missing or mistyped columns, shards that disagree, no rows.
    """
    # A folder may be called *.parquet: what is in it is found by itself. A link to nowhere stays, and is told.
    files = sorted(file for file in path.rglob("*.parquet") if not file.is_dir()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"the folder {path} has no *.parquet file; --data wants a parquet file or a folder of them.")
    columns, filled = check_shards(files)
    if not filled:
        raise UserError(f"{path} has no rows; expected at least one image with question and answer.")
    digest = digest_files(filled)
    table = _open_kept(filled, columns, digest, name or str(path), path if path.is_dir() else path.parent)
    if digest_files(filled) != digest:
        raise UserError(f"{path} was changed while it was read; try again when nobody writes it.")
    return table


def _open_kept(files: list[Path], columns: "dict[str, pa.DataType]", digest: str, name: str, folder: Path) -> Table:
    """Open the Arrow files that are kept of these shards; where they are damaged they are written again, once."""
    read_bound()  # what the environment says wrongly is told before anything is done
    kept = find_folder(columns, digest)
    if kept.is_dir():
        try:
            table = _convert(files, columns, digest, name, folder)
        except Exception as error:  # whatever is wrong with what is kept, the shards are there
            if find_machine_fault(error):
                raise
            table = None
        if table is not None:
            return table
        discard(kept)
    table = _convert(files, columns, digest, name, folder)
    if table is None:
        raise UserError(f"{kept} is not what was just written there: its disk is damaged; set FEDVLM_CACHE to another")
    return table


def _convert(
    files: list[Path], columns: "dict[str, pa.DataType]", digest: str, name: str, folder: Path
) -> Table | None:
    """Convert shards and open what comes of it; None where that does not fit its seal."""
    dataset, hold = convert_shards(files, columns, digest)
    try:
        table = open_dataset(dataset, name, folder)
        assert table.blobs is not None
        sealed = check_seal(table.data, table.blobs)
    except BaseException:
        _let_go(hold)
        raise
    if not sealed:
        _let_go(hold)
        return None
    return dataclasses.replace(table, hold=hold, digest=digest)


def _let_go(hold: Hold | None) -> None:
    if hold is not None:
        hold.let_go()


def open_dataset(dataset: "datasets.Dataset", name: str, folder: Path) -> Table:
    """Map the Arrow files of a data set that `datasets` has in its cache, whose column `image` is not decoded."""
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    data, blobs = open_arrow(files)
    return Table(name, data, folder, blobs, ImageFacts.open(files[0].parent / FACTS))


def _read_inline(text: str) -> bytes | None:
    """The picture that stands in the text itself, as a data URL or in base64; None where the text is a name."""
    if text.startswith("data:") and ";base64," in text[:LONGEST_NAME]:
        text = text.partition(";base64,")[2]
    elif not text.startswith(INLINE) or len(text) <= LONGEST_NAME:
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # many encoders break the lines
    except ValueError:
        return None


def _to_arrow(numbers: "np.ndarray") -> "pa.Array":
    """64-bit integers; by `pa.array` the same, but that imports pandas, a third of a second."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])


def _list_texts(chunk: "pa.Array") -> list[str | None]:
    """An array's values as text; a dictionary's words are made once, not once per row."""
    import pyarrow.types as is_a

    if is_a.is_list(chunk.type):
        return [_choose(cell) for cell in _list_cells(chunk)]
    if not is_a.is_dictionary(chunk.type):
        try:
            # NaN, which is not itself, is how other programs write that there is no number.
            return [None if value is None or value != value else str(value) for value in chunk.to_pylist()]
        except UnicodeDecodeError:
            return [None if value is None else _read_utf8(value) for value in chunk.cast("large_binary").to_pylist()]
    words = _list_texts(chunk.dictionary)
    return [None if code is None else words[code] for code in chunk.indices.to_pylist()]


def _list_cells(chunk: "pa.Array") -> list[list[str | None]]:
    """Every row's texts: those of its list, or its only one."""
    import pyarrow.types as is_a

    if not is_a.is_list(chunk.type):
        return [[text] for text in _list_texts(chunk)]
    texts = _list_texts(chunk.flatten())
    edges = np.cumsum([0, *chunk.value_lengths().fill_null(0).to_pylist()]).tolist()
    return [texts[start:end] for start, end in itertools.pairwise(edges)]


def _choose(answers: "Sequence[str | None]") -> str | None:
    """The most frequent of several answers, of equally frequent ones the first; None where there is none.

    Where one is no UTF-8 nobody knows which is the most frequent.
    """
    if UNREADABLE in answers:
        return UNREADABLE
    counted = Counter(text.strip() for text in answers if text and text.strip())
    return max(counted, key=counted.__getitem__) if counted else None


def _read_utf8(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return UNREADABLE
