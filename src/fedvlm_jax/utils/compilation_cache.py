"""Keep compiled programs from one `fedvlm` command to the next: compiling is most of the time before a first round.

This is jax's persistent compilation cache, switched on for the commands that train or evaluate, through the environment
(which the processes that a command starts inherit) and only where that says nothing about it yet. A program taken from
it is the one that was compiled, so results do not change.

A program from the cache is machine code that runs as the user. So nobody else may have been able to write it: the
folder and the way to it must be the user's and closed to all others, or no program is kept and one line says so.

No heavy package is imported here, unless jax has been already.
"""

import contextlib
import hashlib
import os
import platform
import stat
import sys
from pathlib import Path

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import PLACED as SWITCH
from fedvlm_jax.utils.cache_folders import PROGRAMS, Hold, find_cache

FOLDER = "JAX_COMPILATION_CACHE_DIR"

SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.1,  # jax's own second leaves out the many small ones
    "jax_compilation_cache_max_size": 2 * 2**30,  # bytes; those used longest ago go first
}

_holds: list[Hold] = []  # folders in use until this process ends


def keep_programs() -> Path | None:
    """Have jax keep compiled programs; call it before the first is compiled.

    Libraries should leave the choice to the program, so nothing in this package calls it on import.

    Returns:
        The folder; None where it is switched off, cannot be made, is open to others (printed on stderr), or is already
        decided (`JAX_COMPILATION_CACHE_DIR`).
    """
    chosen = os.environ.get(SWITCH, "")
    if chosen == "0" or FOLDER in os.environ:
        return None
    try:
        # Code for one processor's instructions ends the process on another: homes are shared, machines differ.
        folder = Path(chosen).absolute() if chosen else find_cache() / PROGRAMS / describe_processor()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, UserError):  # no disk to write to, or no home
        return None
    danger = find_danger(folder)
    if danger is not None:
        print(f"fedvlm: compiled programs are not kept: {danger}", file=sys.stderr)  # noqa: T201
        return None
    if not os.access(folder, os.W_OK):
        return None
    from filelock import FileLock, Timeout  # late: it imports asyncio, for which nobody waits who keeps no programs

    folder.chmod(0o700)
    _holds.append(Hold(folder))
    # jax writes a program's time of use last, and finds no room beside one without. It holds this lock meanwhile.
    with contextlib.suppress(OSError, Timeout), FileLock(folder / ".lockfile", timeout=10.0):
        for file in folder.glob("*-cache"):
            if not file.with_name(file.name.removesuffix("-cache") + "-atime").exists():
                file.unlink()
    jax = sys.modules.get("jax")  # which reads the environment when it is imported
    for name, value in {"jax_compilation_cache_dir": str(folder), **SETTINGS}.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            if jax is not None:
                jax.config.update(name, value)
    return folder


def find_danger(folder: Path) -> str | None:
    """Say who else could write to a folder, its content or its parents, and how to mend it; None where nobody could.

    Where the system has no owners of files, it is None.
    """
    if not hasattr(os, "getuid"):
        return None
    # This user and the system's, which in a container may be the owner of `/`.
    trusted = {os.getuid(), 0, Path("/").stat().st_uid}
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() and (path != folder or path.lstat().st_uid not in trusted):
            return f"{path} is a link that may not be yours; remove it"
        found = path.stat()
        if found.st_uid != os.getuid():
            return f"{path} belongs to user {found.st_uid}, not to you; remove it, or set {SWITCH} to a folder"
        if _is_open(found):
            return f"others may write to {path}, so what is in it may be theirs; remove it, or chmod go-w it"
    for path in (path for end in {folder.absolute(), folder.resolve()} for path in end.parents):
        owners, found = {path.lstat().st_uid, path.stat().st_uid}, path.stat()
        if not owners <= trusted or (_is_open(found) and not found.st_mode & stat.S_ISVTX):
            return f"others may write to {path}, and so replace {folder}; set {SWITCH} to a folder in your home"
    return None


def _is_open(found: os.stat_result) -> bool:
    """Tell whether others may write it. A group that has only the user in it is the user."""
    if not found.st_mode & stat.S_IWGRP:  # a look-up of names may ask a server, for every file
        return bool(found.st_mode & stat.S_IWOTH)
    import grp
    import pwd

    alone = False
    with contextlib.suppress(KeyError):
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(found.st_gid)
        same = (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name)
        alone = same and set(group.gr_mem) <= {user.pw_name}
    return bool(found.st_mode & stat.S_IWOTH) or not alone


def describe_processor() -> str:
    """Name the processor's set of instructions by a short digest."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.blake2b(flags.encode(), digest_size=6).hexdigest()}"
