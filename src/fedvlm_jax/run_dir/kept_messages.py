"""Messages that a run keeps for `fedvlm audit`: a safetensors file a round, and the digests of all of them.

A file holds what left the clients whose messages counted, as it left, who they were and what they weighed, and the
server's state before the round. Rounds of local fine-tuning send nothing and have no file.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.models.folder_files import encode_tensors
from fedvlm_jax.run_dir.validated_files import Form, check_form, parse_json
from fedvlm_jax.utils import digests
from fedvlm_jax.utils.files import read_plain, write_bytes, write_json

FOLDER = "messages"
"""The folder, in the run's."""

LIST = "digests.json"
"""In that folder: round -> the digest of its file; written after the file."""

LIST_FORM: Form = {"rounds": dict[str, str]}


class KeptRound(NamedTuple):
    """A round, on the host: the clients that counted [K], their weights and messages [K, …], the server before it."""

    round: int
    numbers: Int[np.ndarray, " clients"]
    weights: Float[np.ndarray, " clients"]
    messages: PyTree
    server: PyTree


def name_file(round_: int) -> str:
    """Name the file of a round.

    >>> name_file(12)
    'round-000012.safetensors'
    """
    return f"round-{round_:06d}.safetensors"


def write_round(folder: Path, kept: KeptRound) -> None:
    """Keep a round in a run's folder: its file whole or not at all, then its digest. Equal rounds leave equal bytes."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    arrays = {"numbers": kept.numbers.astype(np.int32), "weights": kept.weights.astype(np.float32)}
    arrays |= _flatten("messages", kept.messages) | _flatten("server", kept.server)
    content = encode_tensors(arrays, {"format": "fedvlm-jax", "part": "messages", "round": str(kept.round)})
    write_bytes(place / name_file(kept.round), content, sync=True)
    listed = _read_list(folder) if (place / LIST).is_file() else {}
    listed[str(kept.round)] = digests.digest_parts([content]).hex()
    write_json(place / LIST, {"rounds": dict(sorted(listed.items(), key=lambda item: int(item[0])))})


def drop_later(folder: Path, done: int) -> None:
    """Drop what is kept of rounds after round `done`: they are run again.

    Raises:
        UserError: the list of the files is damaged.
    """
    place = folder / FOLDER
    if not (place / LIST).is_file():
        return
    listed = _read_list(folder)
    write_json(place / LIST, {"rounds": {name: digest for name, digest in listed.items() if int(name) <= done}})
    for name in listed:
        if int(name) > done:
            (place / name_file(int(name))).unlink(missing_ok=True)


def count_bytes(messages: PyTree, server: PyTree, clients: int) -> int:
    """Count the bytes of a round's file at most, of the shapes of a client's message and of the server's state."""
    total = 4096 + 8 * clients  # numbers, weights, and the file's own description
    for part, count, values in (("messages", clients, messages), ("server", 1, server)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(values):
            total += count * leaf.size * np.dtype(leaf.dtype).itemsize + len(_name(part, path)) + 160
    return total


def list_rounds(folder: Path) -> list[int]:
    """List the rounds that a run kept, in order.

    Raises:
        UserError: it kept none, or the list is damaged.
    """
    if not (folder / FOLDER / LIST).is_file():
        raise UserError(
            f"{folder} kept no messages, so there is nothing to audit: train with --audit.keep, which is off by default"
        )
    if not (listed := _read_list(folder)):
        raise UserError(f"{folder / FOLDER} lists no round: in none of them did a client count")
    return sorted(map(int, listed))


def check_rounds(folder: Path, rounds: Sequence[int]) -> None:
    """See that the files of rounds are as they were written.

    Raises:
        UserError: one is missing, or is not.
    """
    listed = _read_list(folder)
    for round_ in rounds:
        _read_file(folder, round_, listed)


def _read_file(folder: Path, round_: int, listed: Mapping[str, str]) -> bytes:
    file = folder / FOLDER / name_file(round_)
    try:
        content = read_plain(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it back from a copy, or train again") from None
    if digests.digest_parts([content]).hex() != listed.get(str(round_)):
        raise DamagedError(f"{file} is not as it was written: put it back from a copy, or train again")
    return content


def read_round(folder: Path, round_: int, messages: PyTree, server: PyTree) -> KeptRound:
    """Read a round that was kept, into the structure of a client's message and of the server's state (or shapes).

    Raises:
        UserError: a file is missing or not as it was written, or holds another method's messages, or none at all.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    file = folder / FOLDER / name_file(round_)
    content = _read_file(folder, round_, _read_list(folder))
    # Whoever makes a file can make its digest too.
    try:
        arrays = load(content)
        numbers, weights = arrays["numbers"], arrays["weights"]
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise DamagedError(f"{file} holds no round's messages: put it back from a copy, or train again") from None
    kinds = [(x.ndim, x.dtype) for x in (numbers, weights)]
    if kinds != [(1, np.int32), (1, np.float32)] or len(numbers) != len(weights) or (np.diff(numbers) <= 0).any():
        raise UserError(f"{file} does not say whose messages it holds; is it of another version?")
    if any(not np.isfinite(x).all() for x in arrays.values()):
        raise UserError(f"{file} holds numbers that are not finite, which no run keeps: train again")
    return KeptRound(
        round_,
        numbers,
        weights,
        _fill(file, "messages", messages, arrays),
        _fill(file, "server", server, arrays),
    )


def _flatten(part: str, values: PyTree) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(values)
    return {_name(part, path): np.asarray(leaf) for path, leaf in found}


def _fill(file: Path, part: str, form: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    paths, structure = jax.tree_util.tree_flatten_with_path(form)
    clients = arrays["numbers"].shape if part == "messages" else ()
    wanted = {_name(part, path): ((*clients, *leaf.shape), str(leaf.dtype)) for path, leaf in paths}
    found = {name: (x.shape, str(x.dtype)) for name, x in arrays.items() if name.startswith(f"{part}/")}
    if wanted != found:
        raise UserError(f"{file} does not hold the {part} of this run's method; is it of another version?")
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name in wanted])


def _name(part: str, path: Any) -> str:
    return "/".join((part, *(jax.tree_util.keystr((key,), simple=True) for key in path)))


def _read_list(folder: Path) -> dict[str, str]:
    file = folder / FOLDER / LIST
    try:
        listed = parse_json(file, read_plain(file).decode())
        check_form(file, listed, LIST_FORM)
    except (OSError, ValueError):
        raise UserError(
            f"{file} is damaged; it lists the kept rounds: put it back from a copy, or train again"
        ) from None
    if odd := [name for name in listed["rounds"] if not re.fullmatch("[1-9][0-9]{0,8}", name)]:
        raise UserError(f"{file}: there is no round {odd[0]!r:.20}; is the file damaged?")
    return listed["rounds"]
