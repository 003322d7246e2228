"""Folders of what can be computed again: where they are, which processes use them, how large they may become.

Five kinds lie in one folder, `$FEDVLM_CACHE`, by default `$XDG_CACHE_HOME/fedvlm-jax` or `~/.cache/fedvlm-jax`:

    programs   compiled programs, in a folder per kind of processor; jax writes and bounds them (`compilation_cache.py`)
    features   frozen image features, a folder per model and way of computing
    reference  log-probabilities under the base, likewise
    arrow      tables as Arrow files, a folder per data set
    contents   digests of large files (`digests.py`)

An entry is a folder that is used, counted and removed as a whole. A process that uses it holds a lock in it, which the
system releases however the process ends; a locked entry is never removed. Links out of an entry are not followed, and
files that none of the kinds writes are left alone. No heavy package is imported here.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fedvlm_jax.errors import UserError, check_utf8

try:
    import fcntl
except ImportError:  # not POSIX: nobody's use is seen there, so nothing is removed
    fcntl = None

FOLDER = "FEDVLM_CACHE"
"""Environment: the folder of all kinds."""

BOUND = "FEDVLM_CACHE_GIB"
"""Environment: what features, references and tables may take together, in GiB."""

LOCK = ".in-use"  # a file in every entry: whoever uses the entry has it locked, and its time is that of the newest use

PLACED = "FEDVLM_KEEP_PROGRAMS"
"""Environment: where programs are in place of the folder of all kinds; 0: none are kept."""

PROGRAMS, ARROW = "programs", "arrow"

KINDS: dict[str, tuple[str, ...]] = {
    PROGRAMS: ("*-cache", "*-atime", ".lockfile", "*.textproto"),
    "features": ("*.rows", "*.keys", "shape.json", "*.tmp"),
    "reference": ("*.rows", "*.keys"),
    ARROW: ("*.arrow", "*.npz", "*.tmp", "*.lock", "*.json", "*.txt"),
    "contents": ("*.json", "*.tmp"),
}
"""Every kind, and the names of the files that it writes."""


@dataclass(frozen=True)
class Entry:
    """A folder `path` of one of `KINDS`: bytes and number of its files, and its last use in seconds since 1970."""

    kind: str
    path: Path
    size: int
    count: int
    used: float


def find_cache() -> Path:
    """Find the folder of all kinds.

    Raises:
        UserError: neither the environment nor the system names one, or it has bytes that are no UTF-8.
    """
    if named := os.environ.get(FOLDER, ""):
        return _check(Path(named).absolute())
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:  # XDG: relative paths are to be ignored
        return _check((Path(base) if base.startswith("/") else Path.home() / ".cache") / "fedvlm-jax")
    except RuntimeError:
        raise UserError(f"there is no home folder to keep caches in: set {FOLDER} to a folder") from None


def find_arrow() -> Path:
    """Find the folder of tables: beside those of `datasets` where the environment places these and not ours.

    Raises:
        UserError: see `find_cache`.
    """
    named = os.environ.get("HF_DATASETS_CACHE", "")
    if named and not os.environ.get(FOLDER):
        return _check(Path(named).absolute() / "fedvlm-jax")
    return find_cache() / ARROW


def _check(folder: Path) -> Path:
    check_utf8("the folder of caches", str(folder))
    return folder


class Hold:
    """A mark that this process uses a folder: until it is released, or the process ends, nobody removes the folder."""

    _descriptor: int | None = None

    def __init__(self, folder: Path) -> None:
        """Make the folder where it does not exist, and hold it; one that cannot be written is used without a mark.

        Raises:
            OSError: it cannot be made.
        """
        self._descriptor = _lock(folder, shared=True)
        with contextlib.suppress(OSError):
            os.utime(folder / LOCK)

    def let_go(self) -> None:
        """Release it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.let_go()


def _lock(folder: Path, *, shared: bool) -> int | None:
    """Lock an entry, shared with others or alone; None where that cannot be."""
    # By hand: filelock knows no shared locks, and an entry may be removed while its lock is waited for.
    while True:
        if shared:
            folder.mkdir(parents=True, exist_ok=True)
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # a cache that others filled may be read-only
            with contextlib.suppress(OSError):
                descriptor = os.open(folder / LOCK, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
                break
        else:
            return None
        try:
            if fcntl is None:
                raise OSError("the system has no locks")
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is in use, or the disk knows no locks
            if shared:
                return descriptor
            os.close(descriptor)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat(follow_symlinks=False)):
                return descriptor
        os.close(descriptor)  # whoever removed the entry removed this file while we waited for it
        if not shared:
            return None


def hold_table(folder: Path) -> Hold | None:
    """Hold the folder of a table where it is one of ours; not where another program's cache has it."""
    return Hold(folder) if find_arrow() in folder.absolute().parents else None


def list_entries(kinds: Sequence[str] = tuple(KINDS)) -> list[Entry]:
    """List what lies in the caches, the entry that was used last at the end."""
    found = list[Entry]()
    for kind in kinds:
        for path in _find_entries(kind):
            files = [status for _, status in _list_files(kind, path)]
            times = [status.st_mtime for status in files]
            with contextlib.suppress(OSError):
                times.append((path / LOCK).stat(follow_symlinks=False).st_mtime)
            if files:
                found.append(Entry(kind, path, sum(status.st_size for status in files), len(files), max(times)))
    return sorted(found, key=lambda entry: entry.used)


def _find_entries(kind: str) -> Iterator[Path]:
    root = find_cache()
    if kind == PROGRAMS:
        placed = os.environ.get(PLACED, "0")
        yield from _list_folders(root / kind)
        yield from [Path(placed).absolute()] if placed not in ("", "0") else []
    elif kind == ARROW:  # with Arrow files or their description, finished or not, wherever `datasets` puts them
        tables = find_arrow()
        for folder, _, names in [] if tables.is_symlink() else os.walk(tables):
            if any(name.endswith(".arrow") or name == "dataset_info.json" for name in names):
                yield Path(folder)
    else:
        yield from (path for path in _list_folders(root) if path.name.startswith(f"{kind}-"))


def _list_folders(folder: Path) -> list[Path]:
    try:
        paths = [] if folder.is_symlink() else sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _list_files(kind: str, path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """List the regular files below an entry that its kind writes, by their names."""
    for folder, _, names in os.walk(path):
        for name in names:
            if any(fnmatch(name, pattern) for pattern in KINDS[kind]):
                with contextlib.suppress(OSError):  # another process has just removed it
                    status = Path(folder, name).lstat()
                    if stat.S_ISREG(status.st_mode):
                        yield Path(folder, name), status


def remove(entry: Entry) -> bool:
    """Remove an entry's files, and its folders where nothing else is in them; False where a process uses it."""
    tables = find_arrow()
    with contextlib.ExitStack() as locked:
        # While a table is being written its folder is not known yet, so its writer holds the folder of all tables.
        for folder in (tables, entry.path) if entry.kind == ARROW else (entry.path,):
            lock = _lock(folder, shared=False)
            if lock is None:
                return not entry.path.exists()
            locked.callback(os.close, lock)
        below = [Path(folder) for folder, _, _ in os.walk(entry.path, topdown=False)]
        above = list(entry.path.parents)[: len(entry.path.parts) - len(tables.parts)] if entry.kind == ARROW else []
        # The locks of `datasets`, by which conversions that are under way wait for each other: none is.
        waits = [file for folder in above for file in folder.glob("*.lock") if file.is_file() and not file.is_symlink()]
        for file in (*(file for file, _ in _list_files(entry.kind, entry.path)), entry.path / LOCK, *waits):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in [*below, *above]:
            with contextlib.suppress(OSError):  # files of others are in it
                folder.rmdir()
    return True


def read_bound() -> int:
    """Return the bytes that features, references and tables may take together.

    Raises:
        UserError: the environment says something that is no number above 0.
    """
    given = os.environ.get(BOUND, "")
    try:
        gib = float(given) if given else 100.0
    except ValueError:
        gib = 0.0
    if not 0 < gib * 2**30 < float("inf"):
        raise UserError(f"{BOUND} is {given!r}: it must be a number of GiB above 0")
    return int(gib * 2**30)


def trim(bound: int) -> list[Entry]:
    """Remove what was used longest ago until the rest fits `bound` bytes, and return it; what is in use stays."""
    removed = list[Entry]()
    entries = list_entries([kind for kind in KINDS if kind != PROGRAMS])
    size = sum(entry.size for entry in entries)
    for entry in entries:
        if size <= bound:
            break
        if remove(entry):
            size -= entry.size
            removed.append(entry)
    return removed
