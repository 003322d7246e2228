"""Files that belong to a data set, found below the path that was given, and the splits that their names say."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.digests import digest_files, digest_parts
from fedvlm_jax.utils.safe_paths import read_below

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # JSON that tells about data and holds none
PICTURE = re.compile(r".*\.(png|jpe?g|jpe|jfif|webp|gif|bmp|tiff?|ppm|pgm|jp2|avif)", re.IGNORECASE)  # a file's name
LARGEST = 2**20  # bytes of a description

# The words by which `datasets` finds splits in names; it cuts names at all that is no letter.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


Record = dict[str, Any] | str
"""What stands in a file for one or several rows: values by name; or why it cannot be read."""


LEFT_OUT: Final = object()
"""Stands in a record for bytes that were not read."""


class Part(NamedTuple):
    """A file of records.

    Attributes:
        file: where it is.
        name: its name in the data, for messages.
        base: the folder, below the data's, in which its relative names of pictures begin; "" for the data's own.
        split: the split that its place says; None where it says none.
        label: what its place says beside, for forms whose rows depend on it.
    """

    file: Path
    name: str
    base: str = ""
    split: str | None = None
    label: str = ""


class Content(NamedTuple):
    """All files of a data set, the folder below which its pictures lie, and a digest of what the files hold."""

    folder: Path
    parts: tuple[Part, ...]
    digest: str
    revision: str | None = None


def read_start(file: Path, count: int) -> str:
    """Read the first characters of a file.

    Raises:
        UserError: it is no regular file, or cannot be read.
    """
    if not file.is_file():  # a pipe would be read for ever
        raise UserError(f"{file} is no regular file; replace it or remove it.")
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(count)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error


def walk(folder: Path) -> Iterator[tuple[PurePath, list[str]]]:
    """List a folder and those below it, as paths from it, with their files; hidden ones and links are left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield PurePath(place).relative_to(folder), sorted(name for name in names if not name.startswith("."))


def find_files(path: Path, *suffixes: Sequence[str], below: bool = False) -> Content:
    """Find a file, or those in a folder whose names end in the first of these groups of suffixes that any has.

    Args:
        below: look into the folders in it too, and follow links out of it, as the hub's cache has them.

    Raises:
        UserError: there are none, or one leads out of the folder.
    """
    if not path.is_dir():
        read_start(path, 0)
        return Content(path.parent, (Part(path, path.name),), digest_files([path]))
    names = [place / name for place, held in walk(path) if below or not place.name for name in held]
    for group in suffixes:
        if found := [name for name in names if name.suffix.lower() in group and name.name not in DESCRIPTIONS]:
            return gather(path, sorted(found), links=below)
    raise UserError(f"the folder {path} has no file *{', *'.join(s for group in suffixes for s in group)}.")


def find_pictures(path: Path) -> Content:
    """Find the metadata in a folder of pictures; without any, the folder itself is the one part.

    Raises:
        UserError: it is no folder, or pictures without metadata do not lie in folders of at least two classes.
    """
    if names := [place / name for place, held in walk(path) for name in held if name in METADATA]:
        # `datasets` reads one kind alone; both would be every picture twice.
        if len(kinds := {name.name for name in names}) > 1:
            raise UserError(
                f"{path} has {' and '.join(sorted(kinds))}, of which only one kind is read: remove the others."
            )
        return gather(path, names)
    listed: list[Any] = list(list_classes(path))
    if len({record["chosen"] for record in listed} - {None}) < 2:
        raise UserError(
            f"{path} is no folder of pictures with {', '.join(METADATA)}, nor one whose pictures lie in folders of at "
            "least two classes: write one of these files, or put every class into a folder of its name."
        )
    names = b"".join(os.fsencode(record["image"]) + b"\0" for record in listed)
    return Content(path, (Part(path, ""),), digest_parts([names]).hex())


def list_classes(folder: Path) -> Iterator[Record]:
    """List the pictures below a folder, each with the name of the folder that it lies in."""
    held = [(place, name) for place, names in walk(folder) for name in names]
    found = [(place, name) for place, name in held if PICTURE.fullmatch(name)]
    splits = spread_splits([str(place.parent) for place, _ in found])
    for (place, name), split in zip(found, splits, strict=True):
        yield {"image": str(place / name), "chosen": place.name or None, **({"split": split} if split else {})}


def find_saved(folder: Path) -> Content:
    """Find the Arrow files that a folder of `datasets.save_to_disk` lists, which must lie in it.

    Raises:
        UserError: it is none.
    """
    found = list[tuple[PurePath, str]]()
    try:
        try:
            splits = json.loads(read_below("dataset_dict.json", [folder], LARGEST))["splits"]
        except FileNotFoundError:
            splits = [""]
        for split in splits:
            state = json.loads(read_below(str(PurePath(split, "state.json")), [folder], LARGEST))
            found += [(PurePath(split, entry["filename"]), split) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is no folder of datasets.save_to_disk, or its state.json is damaged") from error
    return gather(folder, [name for name, _ in found], [split for _, split in found])


def gather(folder: Path, names: Sequence[PurePath], labels: Sequence[str] = (), links: bool = False) -> Content:
    """Gather files that lie in a folder, with the splits that their labels, or their own names, say.

    Raises:
        UserError: one leads out of the folder, or is no regular file.
    """
    place = os.path.realpath(folder)
    for name in names:
        inside = "\0" not in str(name) and Path(os.path.realpath(folder / name)).is_relative_to(place)
        if not inside and not links:
            raise UserError(f"{folder / name} leads out of the folder {folder}; put the file itself there.")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is no regular file; replace it or remove it.")
    splits = spread_splits(labels or [str(name.with_suffix("")) for name in names])
    bases = [str(name.parent) if name.parent.name else "" for name in names]
    parts = [Part(folder / n, str(n), base, split) for n, base, split in zip(names, bases, splits, strict=True)]
    return Content(folder, tuple(parts), digest_files(part.file for part in parts))


def spread_splits(names: Sequence[str]) -> list[str | None]:
    """Name the splits of files or folders, by the words in their names; None where all are of the same, or of none.

    >>> spread_splits(["train-1", "train-2", "dev"]), spread_splits(["train2017"])
    (['train', 'train', 'validation'], [None])
    """
    words = {name: re.split(r"[\W\d_]+", name.lower()) for name in {*names}}
    found = {name: next((SPLIT_WORDS[w] for w in words[name] if w in SPLIT_WORDS), None) for name in words}
    several = len({*found.values()}) > 1
    return [(found[name] or name) if several else None for name in names]
