"""Files that a run leaves: JSON written whole or not at all, adapters as safetensors, and where it all ran.

Of several processes the first writes; the others do what it takes to have the same in hand.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import local_base
from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.models.folder_files import encode_tensors
from fedvlm_jax.run_dir.folder_lock import name_command
from fedvlm_jax.run_dir.validated_files import Form, check_form, parse_json
from fedvlm_jax.utils import digests, tree
from fedvlm_jax.utils.files import read_plain, write_bytes, write_json

PACKAGES = (
    *("fedvlm-jax", "jax", "jaxlib", "libtpu", "flax", "optax"),
    *("orbax-checkpoint", "transformers", "datasets", "numpy"),
)
"""Packages on whose versions results depend."""

BASE = "base.safetensors"
"""In the folder of the adapters: the base's weights that a method moved."""

LIST = "clients.json"
"""In the same folder: which file is whose, and the digests of all of them."""

LIST_FORM: Form = {"common": dict[str, str], "clients": {"*": {"file": str, "digest": str, "global?": str}}}

GLOBAL = "global"
"""The folder, below that one, of global models: by the digests of their files, for clients mostly share one."""


def save_adapters(
    folder: Path,
    adapters: Iterable[tuple[str, PyTree]],
    shared: PyTree,
    about: Mapping[str, Any],
    general: Iterable[tuple[str, PyTree]] = (),
) -> None:
    """Write what a run leaves: the shared part, every client's adapter, and the list of these files.

    `clients.json` is written last: client -> its file below `clients/`, the digest of its bytes and that of its global
    model's; and the digests of `shared.safetensors` (what left the clients; absent where nothing did) and of what
    `save_base` wrote. Equal runs leave equal bytes.

    Args:
        adapters: every client's name and whole adapter, shared factors included, usable by itself.
        about: goes into the files' metadata.
        general: every client's name and global model, the shared part with what the client started from.
    """
    if not processes.is_first():
        deque(adapters, maxlen=0)  # to make them takes all processes
        deque(general, maxlen=0)
        return
    metadata = {"format": "fedvlm-jax", **{name: str(value) for name, value in about.items()}}
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    common: dict[str, str] = {}
    if flat := tree.flatten(shared):
        file = folder / "shared.safetensors"
        common[file.name] = _write_arrays(file, flat, {**metadata, "part": "shared"})
    if (folder / BASE).is_file():
        common[BASE] = digests.digest_parts([(folder / BASE).read_bytes()]).hex()
    clients: dict[str, dict[str, str]] = {}
    for name, adapter in adapters:
        file = folder / "clients" / name_file(name)
        digest = _write_arrays(file, tree.flatten(adapter), {**metadata, "part": "personal", "client": name})
        clients[name] = {"file": file.name, "digest": digest}
    for name, adapter in general:
        clients[name]["global"] = _save_global(folder / GLOBAL, tree.flatten(adapter), metadata)
    write_json(folder / LIST, {"common": common, "clients": clients})


def _save_global(folder: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Write a global model under its digest, which is returned, unless it is there."""
    content = encode_tensors(arrays, {**metadata, "part": "global"})
    digest = digests.digest_parts([content]).hex()
    file = folder / f"{digest}.safetensors"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        write_bytes(file, content)
    return digest


def save_base(file: Path, base: PyTree, moved: PyTree) -> None:
    """Write the weights in which `moved` differs from `base`, which a method added to it; no file without any."""
    before, after = tree.flatten(base), tree.flatten(moved)
    changed = {path: local_base(leaf) for path, leaf in after.items() if leaf is not before[path]}
    if changed and processes.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_arrays(file, changed, {"format": "fedvlm-jax", "part": "base"})


def load_base(folder: Path, base: PyTree) -> PyTree:
    """Return the base with the weights that `save_base` wrote into the adapters' folder, where there are any.

    Raises:
        UserError: the file is missing, or not as it was written.
    """
    common = _read_list(folder)["common"]
    return tree.unflatten(tree.flatten(base) | (_read_arrays(folder / BASE, common[BASE]) if BASE in common else {}))


def open_adapters(folder: Path, names: Sequence[str]) -> Callable[[np.ndarray], PyTree]:
    """Give a function that reads the adapters [V, …] of the clients with the numbers [V] in `names`.

    Raises:
        UserError: the list of the files, a client in it or a file is missing, or, when it is read, a file is not as it
            was written.
    """
    listed = _list_clients(folder, names)
    # The folder may be a stranger's: a name with folders in it leads nowhere else.
    paths = [folder / "clients" / Path(each["file"]).name for each in listed]
    return _read_later(paths, [each["digest"] for each in listed])


def open_global(folder: Path, names: Sequence[str]) -> Callable[[np.ndarray], PyTree] | None:
    """Give a function that reads global models, as `open_adapters`; None where nothing is shared, or none was kept.

    Raises:
        UserError: as `open_adapters`.
    """
    found = [each["global"] for each in _list_clients(folder, names) if "global" in each]
    if len(found) < len(names):
        return None
    return _read_later([folder / GLOBAL / Path(f"{digest}.safetensors").name for digest in found], found)


def _list_clients(folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    listed = _read_list(folder)["clients"]
    if absent := [name for name in names if name not in listed]:
        raise UserError(f"{folder / LIST} does not list the client {absent[0]!r}")
    return [listed[name] for name in names]


def _read_later(paths: Sequence[Path], written: Sequence[str]) -> Callable[[np.ndarray], PyTree]:
    """Give a function that reads the files with the numbers [V], which were written with these digests."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing: put it back from a copy, or train again")

    def adapters(numbers: np.ndarray) -> PyTree:
        distinct, which = np.unique(numbers, return_inverse=True)
        read = [_restore_numbers(_read_arrays(paths[number], written[number])) for number in map(int, distinct)]
        return tree.unflatten({path: np.stack([flat[path] for flat in read])[which] for path in read[0]})

    return adapters


def _restore_numbers(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the scale of a layer that is in no stack its shape again: earlier versions wrote [1] for a number.

    >>> layer = {"fc/a": np.ones((4, 2)), "fc/b": np.ones((2, 3)), "fc/scale": np.ones(1)}
    >>> _restore_numbers(layer)["fc/scale"].shape
    ()
    """
    pairs = {path.removesuffix("a") for path, leaf in flat.items() if path.endswith("/a") and leaf.ndim == 2}
    alone = {f"{pair}scale" for pair in pairs}
    return {path: leaf.reshape(()) if path in alone and leaf.shape == (1,) else leaf for path, leaf in flat.items()}


def name_file(client: str) -> str:
    """Name a client's adapter file: another for every client, on every file system, and never long.

    Names of small letters, digits and `-_.` stay as they are. What else there is (capitals, which some file systems do
    not tell apart, letters that have two spellings in Unicode, spaces, great length) is replaced, and a digest of the
    name, which no plain name can end with, tells the client apart.

    >>> name_file("fr-noto"), name_file("Zoë")
    ('fr-noto.safetensors', 'zo~...safetensors')
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,99}(?<!\.)", client):
        return f"{client}.safetensors"
    readable = re.sub(r"[^a-z0-9]+", "_", client.lower())[:60].strip("_")  # for people who list the folder
    return f"{readable}~{hashlib.blake2b(client.encode(), digest_size=16).hexdigest()}.safetensors"


def _write_arrays(file: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Write arrays as safetensors, whole or not at all, and return the digest of the file's bytes."""
    content = encode_tensors(arrays, metadata)
    write_bytes(file, content)
    return digests.digest_parts([content]).hex()


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
    file = folder / LIST
    try:
        listed = parse_json(file, read_plain(file).decode())
        check_form(file, listed, LIST_FORM)
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing, the list of the clients' adapters: is the run finished, and not of version 0.1?"
        ) from None
    except (OSError, ValueError):
        raise UserError(
            f"{file} is damaged; it lists the clients' adapters: put it back from a copy, or train again"
        ) from None
    return listed


def describe_environment() -> dict[str, Any]:
    """Describe versions, machine and, in a checkout, the commit."""
    root, commit = Path(__file__).parents[3], None
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or the checkout of another user
            commit = subprocess.check_output(
                ["git", "rev-parse", "HEAD"], cwd=root, stderr=subprocess.DEVNULL, text=True
            ).strip()
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    return {"versions": describe_versions(), "machine": machine, "commit": commit}


def describe_start() -> dict[str, str]:
    """Return the time, with its zone, and the command that was given."""
    return {"started": datetime.now().astimezone().isoformat(timespec="seconds"), "command": name_command()}


def describe_versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
