"""Paths out of a stranger's table or run folder, read only where they lie below a folder that the user gave.

What they name ends up in a model, or in a report that is passed on. Links are resolved first, and the resolved path is
opened, so that neither `..` nor a link leads outside.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path


class OutsideError(ValueError):
    """A name that leads out of the folders it is meant for."""


def read_below(name: str, folders: Sequence[Path], most: int = 2**28) -> bytes:
    """Read the file `name` below one of the folders, links resolved; relative names begin in each of them in turn.

    Raises:
        OutsideError: it would lie outside of all of them, whether it exists or not.
        OSError: it cannot be read, is no regular file (a pipe would be read for ever), or has more than `most` bytes.
        ValueError: the name holds a NUL.
    """
    # The folders may be links themselves, as in the hub's cache.
    allowed = [Path(os.path.realpath(folder)) for folder in folders]
    for folder in folders:
        found = Path(os.path.realpath(folder / name))
        if not any(found.is_relative_to(place) for place in allowed):
            raise OutsideError(name)
        if os.path.lexists(found):  # a link that leads back to itself is there, and cannot be opened
            break
    else:
        raise FileNotFoundError(name)
    # O_NOFOLLOW: a link put here since the path was resolved is not followed. O_NONBLOCK: opening a pipe does not wait.
    opened = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(opened, "rb") as file:
        about = os.fstat(opened)
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            raise OSError(f"{name} is no regular file of at most {most} bytes")
        return file.read()
