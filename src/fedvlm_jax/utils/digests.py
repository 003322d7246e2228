"""Short digests of what is written, so that what is read again is known to be the same.

XXH3-128 (https://xxhash.com), as fast as memory is read: it finds damage and mistakes, which is what is asked of it
here, and is no defence against somebody who makes two contents with one digest on purpose.
"""

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SIZE", "digest_parts"]

SIZE = 16
"""Bytes of a digest."""


def digest_parts(parts: "Iterable[bytes | np.ndarray]", *numbers: int) -> bytes:
    """The digest of contents laid end to end, and of numbers that say what they are.

    Args:
        parts: bytes, or C-contiguous arrays, whose types and shapes do not count.
        numbers: signed 64-bit.
    """
    state = xxhash.xxh3_128(struct.pack(f"<{len(numbers)}q", *numbers))
    for part in parts:
        state.update(part if isinstance(part, bytes) else part.reshape(-1).view("uint8").data)
    return state.digest()
