"""Files that a run leaves: JSON written whole or not at all, adapters as safetensors, and where it all ran.

Of several processes the first writes; the others do what it takes to have the same in hand.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from fedvlm_jax import processes, tree
from fedvlm_jax.errors import UserError
from fedvlm_jax.sharding import own_base

__all__ = [
    "BASE",
    "describe_environment",
    "describe_versions",
    "load_base",
    "open_adapters",
    "save_adapters",
    "save_base",
    "write_json",
]

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


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    if not processes.is_first():
        return
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def save_adapters(
    folder: Path, adapters: Iterable[tuple[str, PyTree]], shared: PyTree, about: Mapping[str, Any]
) -> None:
    """Write `shared.safetensors` (what left the clients; absent where nothing did) and `clients/<name>.safetensors`.

    Args:
        folder: where to.
        adapters: every client's name and whole adapter, shared factors included, usable by itself. Characters of a name
            that file systems dislike are replaced; the name itself is in the metadata.
        shared: the shared tree.
        about: goes into the files' metadata.
    """
    from safetensors.numpy import save_file

    if not processes.is_first():
        deque(adapters, maxlen=0)
        return
    metadata = {"format": "fedvlm-jax", **{name: str(value) for name, value in about.items()}}
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    flat = tree.flatten(shared)
    if flat:
        arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flat.items()}
        save_file(arrays, folder / "shared.safetensors", {**metadata, "part": "shared"})
    for name, adapter in adapters:
        arrays = {path: np.ascontiguousarray(leaf) for path, leaf in tree.flatten(adapter).items()}
        target = folder / "clients" / f"{safe_name(name)}.safetensors"
        save_file(arrays, target, {**metadata, "part": "personal", "client": name})


def save_base(file: Path, base: PyTree, moved: PyTree) -> None:
    """Write the weights in which `moved` differs from `base`: what a method added to the base; no file without any."""
    from safetensors.numpy import save_file

    before, after = tree.flatten(base), tree.flatten(moved)
    changed = {path: np.ascontiguousarray(own_base(leaf)) for path, leaf in after.items() if leaf is not before[path]}
    if changed and processes.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(changed, file, {"format": "fedvlm-jax", "part": "base"})


def load_base(file: Path, base: PyTree) -> PyTree:
    """The base with the weights that `save_base` wrote, where there are any."""
    from safetensors.numpy import load_file

    return tree.unflatten(tree.flatten(base) | (load_file(file) if file.is_file() else {}))


def open_adapters(folder: Path, names: Sequence[str]) -> Callable[[np.ndarray], PyTree]:
    """Give the clients' stored adapters [V, …] for the numbers [V] of the clients in `names`, read when asked for.

    Raises:
        UserError: a file is missing.
    """
    from safetensors.numpy import load_file

    paths = [folder / "clients" / f"{safe_name(name)}.safetensors" for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing: is the run finished?")

    def adapters(numbers: np.ndarray) -> PyTree:
        distinct, which = np.unique(numbers, return_inverse=True)
        own = [load_file(paths[number]) for number in distinct]
        return tree.unflatten({path: np.stack([flat[path] for flat in own])[which] for path in own[0]})

    return adapters


def safe_name(name: str) -> str:
    """A client's name as a file's name; unlike names stay unlike."""
    return "".join(c if c.isalnum() or c in "-_." else f"%{ord(c):x}" for c in name) or "%"


def describe_environment() -> dict[str, Any]:
    """Versions, machine and, from a checkout, the commit."""
    return {
        "versions": describe_versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "commit": _commit(),
    }


def describe_versions() -> dict[str, str | None]:
    """Of Python and of the packages that results depend on; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
