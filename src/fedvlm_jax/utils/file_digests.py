"""Digests of the contents of files: one of the same name, size and time stamp is not taken for the same file.

A large file is read once: its digest is remembered under what the system says of it. A change of content changes the
time of the last change (ctime), which, unlike that of the last modification, nobody can set; a file that was changed
within the last seconds, less than some clocks tell apart, is not remembered.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import xxhash

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils import digests
from fedvlm_jax.utils.cache_folders import find_cache, read_plain, write_whole

__all__ = ["digest_file", "digest_files"]

LARGE = 2**24
"""Bytes from which on a digest is remembered: smaller files are read in milliseconds."""

SETTLED = 10.0
"""Seconds after its last change from which on a file's time stamps tell its next change; of FAT and NFS it is 2."""

FOLDER = "contents-of-files"
"""In the folder of caches, whose kind `contents` it is."""


def digest_files(files: Iterable[Path]) -> str:
    """The digest of the contents of files, in their order; their names and places do not count.

    Raises:
        UserError: one cannot be read.
    """
    return digests.digest_parts([digest_file(file).encode() for file in files]).hex()


def digest_file(file: Path) -> str:
    """The digest of a file's content, as hex.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb", buffering=0) as opened:
            before = _identify(file, os.fstat(opened.fileno()))
            large = os.fstat(opened.fileno()).st_size >= LARGE
            if large and (known := _recall(before)):
                return known
            digest = hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
            status = os.fstat(opened.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if large and before == _identify(file, status) and time.time() - status.st_ctime > SETTLED:
        _remember(before, digest)
    return digest


def _identify(file: Path, status: os.stat_result) -> list[str | int]:
    """What the system says of a file; another content under the same of all of this cannot be."""
    return [
        *(os.path.realpath(file), status.st_dev, status.st_ino),
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
    ]


def _place(identity: list[str | int]) -> Path:
    name = digests.digest_parts([str(identity[0]).encode("utf-8", "surrogateescape")]).hex()
    return find_cache() / FOLDER / f"{name}.json"


def _recall(identity: list[str | int]) -> str | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, UserError):
        known = json.loads(read_plain(_place(identity)))
        if known["file"] == identity and isinstance(known["digest"], str):
            return known["digest"]
    return None


def _remember(identity: list[str | int], digest: str) -> None:
    with contextlib.suppress(OSError, ValueError, UserError):  # what cannot be kept costs time, nothing else
        place = _place(identity)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({"file": identity, "digest": digest}).encode())
