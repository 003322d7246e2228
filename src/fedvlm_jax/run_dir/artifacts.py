"""Files that a run leaves: JSON written whole or not at all, adapters as safetensors, and where it all ran.

Of several processes the first writes; the others do what it takes to have the same in hand.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import own_base
from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.run_dir.folder_lock import name_command
from fedvlm_jax.utils import digests, tree
from fedvlm_jax.utils.files import read_plain, write_bytes, write_json

PACKAGES = (
    "fedvlm-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "numpy",
)


BASE = "base.safetensors"
"""In the folder of the adapters: the base's weights that a method moved."""

LIST = "clients.json"
"""In the same folder: which file is whose, and the digests of all of them."""

PLAIN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}(?<!\.)")
"""Client names that are file names everywhere as they are."""

READABLE = 60
"""Characters that are kept of other names, for who lists the folder."""


def save_adapters(
    folder: Path, adapters: Iterable[tuple[str, PyTree]], shared: PyTree, about: Mapping[str, Any]
) -> None:
    """Write what a run leaves: the shared part, every client's adapter, and the list of these files.

    `clients.json` is written last: client -> its file below `clients/` and the digest of its bytes, and the digests of
    `shared.safetensors` (what left the clients; absent where nothing did) and of what `save_base` wrote. Equal runs
    leave equal bytes.

    Args:
        folder: where to.
        adapters: every client's name and whole adapter, shared factors included, usable by itself.
        shared: the shared tree.
        about: goes into the files' metadata.
    """
    if not processes.is_first():
        deque(adapters, maxlen=0)
        return
    metadata = {"format": "fedvlm-jax", **{name: str(value) for name, value in about.items()}}
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    common: dict[str, str] = {}
    if flat := tree.flatten(shared):
        common["shared.safetensors"] = _write_arrays(
            folder / "shared.safetensors", flat, {**metadata, "part": "shared"}
        )
    if (folder / BASE).is_file():
        common[BASE] = digests.digest_parts([(folder / BASE).read_bytes()]).hex()
    clients: dict[str, dict[str, str]] = {}
    for name, adapter in adapters:
        file, about_it = name_file(name), {**metadata, "part": "personal", "client": name}
        digest = _write_arrays(folder / "clients" / file, tree.flatten(adapter), about_it)
        clients[name] = {"file": file, "digest": digest}
    write_json(folder / LIST, {"common": common, "clients": clients})


def save_base(file: Path, base: PyTree, moved: PyTree) -> None:
    """Write the weights in which `moved` differs from `base`: what a method added to the base; no file without any."""
    before, after = tree.flatten(base), tree.flatten(moved)
    changed = {path: own_base(leaf) for path, leaf in after.items() if leaf is not before[path]}
    if changed and processes.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_arrays(file, changed, {"format": "fedvlm-jax", "part": "base"})


def load_base(folder: Path, base: PyTree) -> PyTree:
    """The base with the weights that `save_base` wrote into the adapters' folder, where there are any.

    Raises:
        UserError: the file is missing, or not as it was written.
    """
    common = _read_list(folder)["common"]
    return tree.unflatten(tree.flatten(base) | (_read_arrays(folder / BASE, common[BASE]) if BASE in common else {}))


def open_adapters(folder: Path, names: Sequence[str]) -> Callable[[np.ndarray], PyTree]:
    """Give the clients' stored adapters [V, …] for the numbers [V] of the clients in `names`, read when asked for.

    Raises:
        UserError: the list of the files, a client in it or a file is missing, or, when it is read, a file is not as it
            was written.
    """
    listed = _read_list(folder)["clients"]
    if absent := [name for name in names if name not in listed]:
        raise UserError(f"{folder / LIST} does not list the client {absent[0]!r}")
    paths = [folder / "clients" / Path(listed[name]["file"]).name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing: put it back from a copy, or train again")

    def adapters(numbers: np.ndarray) -> PyTree:
        distinct, which = np.unique(numbers, return_inverse=True)
        own = [_read_arrays(paths[number], listed[names[number]]["digest"]) for number in distinct]
        return tree.unflatten({path: np.stack([flat[path] for flat in own])[which] for path in own[0]})

    return adapters


def name_file(client: str) -> str:
    """The name of a client's adapter file: another for every name, on every file system, and never long.

    Names of small letters, digits and `-_.` stay as they are. What else there is (capitals, which some file systems do
    not tell apart, letters that have two spellings in Unicode, spaces, great length) is replaced, and a digest of the
    name, which no plain name can end with, tells the client apart.
    """
    if PLAIN.fullmatch(client):
        return f"{client}.safetensors"
    seen = re.sub(r"[^a-z0-9]+", "_", client.lower())[:READABLE].strip("_")
    return f"{seen}~{hashlib.blake2b(client.encode(), digest_size=16).hexdigest()}.safetensors"


def _write_arrays(file: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Write arrays as safetensors, whole or not at all; equal arrays and metadata are equal bytes.

    Returns:
        The digest of the file's bytes.
    """
    from safetensors.numpy import save

    content = _sort_metadata(save({path: np.ascontiguousarray(leaf) for path, leaf in arrays.items()}, dict(metadata)))
    write_bytes(file, content)
    return digests.digest_parts([content]).hex()


def _sort_metadata(content: bytes) -> bytes:
    """Put a safetensors file's metadata in the order of their names: the library's is another in every process."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def _read_arrays(file: Path, digest: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    try:
        content = read_plain(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it back from a copy, or train again") from error
    if digests.digest_parts([content]).hex() != digest:
        raise DamagedError(f"{file} is not as it was written: put it back from a copy, or train again")
    return load(content)


def _read_list(folder: Path) -> dict[str, Any]:
    """The list of the adapters' files.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / LIST
    try:
        listed = json.loads(read_plain(file))
        sound = all(isinstance(digest, str) for digest in listed["common"].values()) and all(
            isinstance(entry["file"], str) and isinstance(entry["digest"], str) for entry in listed["clients"].values()
        )
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing, the list of the clients' adapters: is the run finished, and not of version 0.1?"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        sound, listed = False, {}
    if not sound:
        raise UserError(f"{file} is damaged; it lists the clients' adapters: put it back from a copy, or train again")
    return listed


def describe_environment() -> dict[str, Any]:
    """Versions, machine and, from a checkout, the commit."""
    return {
        "versions": describe_versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "commit": _commit(),
    }


def describe_start() -> dict[str, str]:
    """Return when this is, with its time zone, and the command that was given."""
    return {"started": datetime.now().astimezone().isoformat(timespec="seconds"), "command": name_command()}


def describe_versions() -> dict[str, str | None]:
    """Of Python and of the packages that results depend on; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[4]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
