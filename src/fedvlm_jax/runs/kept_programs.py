"""Keep compiled programs from one `fedvlm` command to the next: compiling is most of the time before a first round.

This is jax's own persistent compilation cache, switched on for the commands that train or evaluate. It finds a program
again by a hash of the program, of what compiles it and of the devices; a program taken from it is the one that was
compiled, so results do not change. Of jax it is asked through the environment, which the processes that a command
starts inherit, and only where the environment says nothing about it yet.

No heavy package is imported here, unless jax has been already.
"""

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

__all__ = ["SHELF", "SWITCH", "describe_processor", "find_cache", "keep_programs"]

SWITCH = "FEDVLM_KEEP_PROGRAMS"
"""Environment: 0 switches it off, a folder places it."""

SHELF = "FEDVLM_PROGRAM_SHELF"
"""Environment, set here alone: where `runs.shelf` keeps programs that are found without tracing them."""

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SHORTEST = "jax_persistent_cache_min_compile_time_secs"
"""Programs that compile faster are not kept; jax's own second leaves out the many small ones."""


def find_cache() -> Path:
    """The user's folder for what can be made again: XDG's, or `~/.cache`."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(told) if told.startswith("/") else Path.home() / ".cache"  # XDG: relative paths are to be ignored
    return base / "fedvlm-jax"


def keep_programs() -> Path | None:
    """Have jax keep compiled programs; call it before the first is compiled.

    Libraries should leave the choice to the program, so nothing in this package calls it on import.

    Returns:
        The folder; None where it is switched off, cannot be made, or is already decided (`JAX_COMPILATION_CACHE_DIR`).
    """
    told = os.environ.get(SWITCH, "")
    if told == "0" or FOLDER in os.environ:
        return None
    try:
        # Code for one processor's instructions ends the process on another: homes are shared, machines differ.
        folder = Path(told) if told else find_cache() / "programs" / describe_processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no disk to write to, or no home
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax = sys.modules.get("jax")  # which reads the environment when it is imported
    for name, value in {"jax_compilation_cache_dir": str(folder.absolute()), SHORTEST: 0.1}.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            if jax is not None:
                jax.config.update(name, value)
    os.environ[SHELF] = str(folder.absolute() / "ready")
    return folder


def describe_processor() -> str:
    """Short, and another where the instructions that there are differ."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.blake2b(told.encode(), digest_size=6).hexdigest()}"
