"""Files written whole or not at all, and files read that may be anything.

Every reader, on other machines too, sees all of the new content or what was there before: it is written beside the file
and renamed onto it.
"""

import errno
import json
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import naming


def write_bytes(file: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file whole or not at all, into a folder that exists.

    Args:
        sync: wait until the disk has it, so that it outlives a power cut.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    # A name that no other process takes: caches are written by several at once.
    scratch = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(file), scratch.open("xb") as opened:
            opened.write(content)
            if sync:
                opened.flush()
                os.fsync(opened.fileno())
        scratch.replace(file)
        if sync:
            _sync_name(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _sync_name(file: Path) -> None:
    """Wait until the disk has a file's name as well, which is its folder's."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks do not sync folders
            os.fsync(folder)
    finally:
        os.close(folder)


def write_text(file: Path, text: str, *, sync: bool = False) -> None:
    """Write a text as UTF-8; see `write_bytes`."""
    write_bytes(file, text.encode(), sync=sync)


def write_json(file: Path, content: Any) -> None:
    r"""Write JSON that people can read, and wait until the disk has it; see `write_bytes`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "scores.json")
    >>> write_json(file, {"Zoë": 0.5})
    >>> file.read_text(encoding="utf-8")
    '{\n "Zoë": 0.5\n}'
    """
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False), sync=True)


def read_plain(file: Path) -> bytes:
    """Read a file that may be anything: a pipe would be waited for, and a device never ends.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(file))
    return file.read_bytes()
