"""Compiled programs of earlier commands, ready to run: the same command again need not even trace them.

jax's own cache (`kept_programs`) finds a program by its text, which has to be traced and lowered first; for a small
model that takes longer than loading what was compiled. Here a program lies under a hash of everything that its text is
made from: this package's sources, the versions of what traces and compiles, jax's settings, the devices, the shapes of
the arguments and where they lie, and what the caller knows of it. Where any of it differs it is made anew; a file that
cannot be read is written again. What is taken from here is the program that was compiled then, bit for bit.

What lies here is not in jax's cache too: a program that XLA read from a file it cannot write down again.

It is for commands, which nobody patches while they run; a library's user, who may, has none.
"""

import contextlib
import hashlib
import os
import pickle
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

import jax
from jax import monitoring
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import fedvlm_jax
from fedvlm_jax import processes
from fedvlm_jax.runs.kept_programs import SHELF, describe_processor
from fedvlm_jax.runs.storage import describe_versions

__all__ = ["Shelf", "open_shelf"]

SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "NCCL_")
"""Beginnings of the names by which the environment says how to compile and run."""

KEPT_BY_JAX = "jax_enable_compilation_cache"

PLACES = ("JAX_COMPILATION_CACHE_DIR", "jax_compilation_cache_dir", KEPT_BY_JAX)
"""Settings that say only where compiled programs are."""

FOUND_BY_JAX = "/jax/compilation_cache/cache_hits"
"""jax's event: a program was taken from its cache."""


class Shelf:
    """A folder of compiled programs.

    Attributes:
        folder: where they are; None: none are kept.
        about: of all programs asked for here.
    """

    def __init__(self, folder: Path | None = None, about: Hashable = ()) -> None:
        """Open a folder, which is made when the first program is kept."""
        self.folder, self.about = folder, about

    def of(self, *about: Hashable) -> "Shelf":
        """The same folder, for programs of which this too is known; values whose repr tells them apart."""
        return Shelf(self.folder, (self.about, about))

    def __call__(self, name: Hashable, arguments: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A compiled program: an earlier command's where it is here, otherwise what `make` returns, to be kept.

        Args:
            name: which of the programs that have the same `about` and arguments.
            arguments: what it is called with, arrays or their shapes.
            make: compiles it; what it raises is raised.
        """
        if self.folder is None:
            return make()
        described = (_describe_makers(), self.about, name, _describe_arguments(arguments))
        file = self.folder / f"{hashlib.blake2b(repr(described).encode(), digest_size=20).hexdigest()}.program"
        compiled = _load(file)
        if compiled is None:
            compiled, whole = _compile_here(make)
            if whole:
                _save(file, compiled)
        return compiled


def open_shelf() -> Shelf:
    """The shelf of the command that runs: of none where none keeps programs, or where several processes share them."""
    folder = os.environ.get(SHELF)
    return Shelf(Path(folder) if folder and processes.count() == 1 else None)


def _load(file: Path) -> Any | None:
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
    except Exception:  # whatever is wrong with a cache's file, the program can be made again
        return None


def _compile_here(make: Callable[[], Any]) -> tuple[Any, bool]:
    """What `make` returns, compiled and not taken from jax's cache; and whether that is so.

    On CPU an executable that was loaded serialises without the bodies of its functions: the copy loads, and fails when
    it runs. jax asks once per process whether its cache is used, and a compilation in another thread may be the one
    that asks, so its event is listened to as well.
    """
    thread, found = get_ident(), []

    def listen(event: str, **_: Any) -> None:
        if event == FOUND_BY_JAX and get_ident() == thread:
            found.append(event)

    used = jax.config.values[KEPT_BY_JAX]
    monitoring.register_event_listener(listen)
    try:
        _use_cache_of_jax(False)
        return make(), not found
    finally:
        _use_cache_of_jax(used)
        monitoring.unregister_event_listener(listen)


def _use_cache_of_jax(used: bool) -> None:
    jax.config.update(KEPT_BY_JAX, used)
    reset_cache()  # it would not ask again


def _save(file: Path, compiled: Any) -> None:
    """Write a program whole or not at all; where that cannot be it runs all the same."""
    scratch = file.with_suffix(f".{os.getpid()}")
    try:
        content = pickle.dumps(serialize_executable.serialize(compiled))
    except Exception:  # jax raises many kinds for what it cannot write down
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(file)


def _describe_arguments(arguments: tuple[Any, ...]) -> list[tuple[str, ...]]:
    return [
        (
            jax.tree_util.keystr(path),
            str(jax.typeof(leaf)),
            str(getattr(leaf, "weak_type", "")),
            str(getattr(leaf, "sharding", "")),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
    ]


@cache
def _describe_makers() -> str:
    """Everything that decides what a function of this package compiles to, beside its arguments."""
    told = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS) and name not in PLACES}
    settings = {name: value for name, value in jax.config.values.items() if name not in PLACES}
    devices = [(device.id, device.device_kind, device.client.platform_version) for device in jax.devices()]
    makers = (_hash_sources(), describe_versions(), describe_processor())
    return repr((makers, sorted(told.items()), settings, devices))


def _hash_sources() -> str:
    root, digest = Path(fedvlm_jax.__file__).parent, hashlib.blake2b()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()
