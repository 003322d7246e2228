"""Trees of arrays as one flat vector of bytes, and a digest of their schema by which both sides know what they send.

Leaves lie one behind the other in the order of their paths, raw: a message takes the bytes that are counted for it and
nothing else, and bfloat16 travels as it is.
"""

import hashlib
import json
import math

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.errors import UserError


def digest_schema(shapes: PyTree) -> str:
    """Digest the paths, shapes and types of a tree's leaves, arrays or their shapes.

    >>> one = {"b": np.zeros((2, 3), np.float32)}
    >>> digest_schema(one) == digest_schema({"b": np.ones((2, 3), np.float32)}) != digest_schema({"b": np.zeros(6)})
    True
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    listed = [[jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def count_bytes(shapes: PyTree) -> int:
    """Count the bytes of a tree's vector.

    >>> count_bytes({"b": np.zeros((2, 3), np.float32), "r": np.zeros((), np.int32)})
    28
    """
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes))


def pack(tree: PyTree) -> bytes:
    """Lay a tree's leaves end to end.

    >>> pack({"b": np.float32([1.0]), "a": np.int32([2])}).hex()
    '020000000000803f'
    """
    return b"".join(np.ascontiguousarray(jax.device_get(leaf)).tobytes() for leaf in jax.tree.leaves(tree))


def unpack(payload: bytes, shapes: PyTree) -> PyTree:
    """Read a vector as a tree of these shapes, on the host.

    Raises:
        UserError: it has another length.

    >>> unpack(bytes.fromhex("020000000000803f"), {"a": np.int32([0]), "b": np.float32([0])})
    {'a': array([2], dtype=int32), 'b': array([1.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(shapes)
    if len(payload) != (wanted := count_bytes(shapes)):
        raise UserError(f"{len(payload):,} bytes came, and {wanted:,} were expected: the two sides do not fit")
    found, at = [], 0
    for leaf in leaves:
        kind, size = np.dtype(leaf.dtype), math.prod(leaf.shape)
        found.append(np.frombuffer(payload, kind, size, at).reshape(leaf.shape))
        at += size * kind.itemsize
    return jax.tree.unflatten(structure, found)
