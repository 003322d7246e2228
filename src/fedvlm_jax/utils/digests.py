"""Digests of contents, by which what is read again is known to be the same.

XXH3-128 (https://xxhash.com) is as fast as memory is read. It finds damage and mistakes; it is no defence against
somebody who makes two contents with one digest on purpose.
"""

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import find_cache
from fedvlm_jax.utils.files import read_plain, write_bytes

if TYPE_CHECKING:
    import numpy as np

DIGEST_SIZE = 16
"""Bytes of a digest."""

LARGE = 2**24  # bytes from which on a file's digest is remembered: smaller files are read in milliseconds

# Seconds after its last change from which on a file's time stamps show its next change; of FAT and NFS it is 2.
SETTLED = 10.0

FOLDER = "contents-of-files"  # in the folder of caches, whose kind `contents` it is


def digest_parts(parts: "Iterable[bytes | np.ndarray]", *numbers: int) -> bytes:
    """Digest contents laid end to end, and signed 64-bit numbers that say what they are.

    Args:
        parts: bytes, or C-contiguous arrays, whose types and shapes do not count.

    >>> digest_parts([b"ab"]) == digest_parts([b"a", b"b"]) != digest_parts([b"ab"], 2)
    True
    """
    state = xxhash.xxh3_128(struct.pack(f"<{len(numbers)}q", *numbers))
    for part in parts:
        state.update(part if isinstance(part, bytes) else part.reshape(-1).view("uint8").data)
    return state.digest()


def digest_files(files: Iterable[Path]) -> str:
    """Digest the contents of files, in their order; their names and places do not count.

    Raises:
        UserError: one cannot be read.
    """
    return digest_parts([digest_file(file).encode() for file in files]).hex()


def digest_file(file: Path) -> str:
    """Digest a file's content, as hex. A large file is read once: its digest is remembered in the cache.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb", buffering=0) as opened:
            identity = _identify(file, os.fstat(opened.fileno()))
            large = os.fstat(opened.fileno()).st_size >= LARGE
            if large and (known := _recall(identity)):
                return known
            digest = hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
            after = os.fstat(opened.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if large and identity == _identify(file, after) and time.time() - after.st_ctime > SETTLED:
        with contextlib.suppress(OSError, ValueError, UserError):  # what cannot be kept costs time, nothing else
            place = _place(identity)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, json.dumps({"file": identity, "digest": digest}).encode())
    return digest


def _identify(file: Path, status: os.stat_result) -> list[str | int]:
    """List what differs between any two contents: unlike the time of modification, nobody can set ctime."""
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [os.path.realpath(file), status.st_dev, status.st_ino, status.st_size, *times]


def _place(identity: list[str | int]) -> Path:
    name = digest_parts([str(identity[0]).encode("utf-8", "surrogateescape")]).hex()
    return find_cache() / FOLDER / f"{name}.json"


def _recall(identity: list[str | int]) -> str | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, UserError):
        known = json.loads(read_plain(_place(identity)))
        if known["file"] == identity and isinstance(known["digest"], str):
            return known["digest"]
    return None
