"""The folders of what can be made again: where they are, who uses them, and how large they may become.

Five kinds lie in one folder, `$FEDVLM_CACHE`, by default `$XDG_CACHE_HOME/fedvlm-jax` or `~/.cache/fedvlm-jax`:

    programs   compiled programs, in a folder per kind of processor; jax writes and bounds them (`runs.kept_programs`)
    features   frozen image features, a folder per model and way of computing
    reference  log-probabilities under the base, likewise
    arrow      tables as Arrow files, a folder per data set
    contents   digests of large files, by what the system says of them (`contents.py`)

An entry is a folder that is used, counted and removed as a whole. Who uses one holds a lock in it, which the system
lets go when the process ends, however it ends; what is locked is never removed. Nothing is followed out of an entry:
links are left alone, and so is every file that none of our kinds writes. No heavy package is imported here.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fedvlm_jax.errors import UserError, check_utf8, naming

try:
    import fcntl
except ImportError:  # not POSIX: nobody's use is seen there, so nothing is removed
    fcntl = None

__all__ = [
    "ARROW",
    "BOUND",
    "FOLDER",
    "KINDS",
    "PLACED",
    "PROGRAMS",
    "Entry",
    "Hold",
    "find_arrow",
    "find_cache",
    "hold_table",
    "list_entries",
    "read_bound",
    "read_plain",
    "remove",
    "trim",
    "write_whole",
]

FOLDER = "FEDVLM_CACHE"
"""Environment: the folder of all kinds."""

BOUND = "FEDVLM_CACHE_GIB"
"""Environment: what features, references and tables may take together, in GiB."""

DEFAULT_GIB = 100.0

LOCK = ".in-use"
"""A file in every entry: whoever uses the entry has it locked, and its time is that of the newest use."""

PLACED = "FEDVLM_KEEP_PROGRAMS"
"""Environment: where programs are in place of the folder of all kinds; 0: none are kept."""

PROGRAMS, ARROW = "programs", "arrow"

KINDS: dict[str, tuple[str, ...]] = {
    PROGRAMS: ("*-cache", "*-atime", ".lockfile", "*.textproto", "*.program"),
    "features": ("*.rows", "*.keys", "shape.json", "features.bin", "keys.txt"),
    "reference": ("*.rows", "*.keys", "reference-*"),
    ARROW: ("*.arrow", "*.npz", "*.tmp", "*.lock", "*.json", "*.txt"),
    "contents": ("*.json", "*.tmp"),
}
"""Every kind, and the names of the files that it writes or, in 0.1, wrote."""


@dataclass(frozen=True)
class Entry:
    """One entry of a cache.

    Attributes:
        kind: one of `KINDS`.
        path: its folder, or a file of 0.1.
        size: bytes of its files.
        count: of its files.
        used: when it was used last, seconds since 1970.
    """

    kind: str
    path: Path
    size: int
    count: int
    used: float


def find_cache() -> Path:
    """The folder of all kinds.

    Raises:
        UserError: neither the environment nor the system names one, or it has bytes that are no UTF-8.
    """
    told = os.environ.get(FOLDER, "")
    if told:
        return _check(Path(told).absolute())
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:  # XDG: relative paths are to be ignored
        return _check((Path(base) if base.startswith("/") else Path.home() / ".cache") / "fedvlm-jax")
    except RuntimeError:
        raise UserError(f"there is no home folder to keep caches in: set {FOLDER} to a folder") from None


def _check(folder: Path) -> Path:
    check_utf8("the folder of caches", str(folder))
    return folder


def find_arrow() -> Path:
    """The folder of tables: beside other data sets, where the environment says where those are and not where ours are.

    Raises:
        UserError: see `find_cache`.
    """
    told = os.environ.get("HF_DATASETS_CACHE", "")
    if told and not os.environ.get(FOLDER):
        return _check(Path(told).absolute() / "fedvlm-jax")
    return find_cache() / ARROW


class Hold:
    """A sign that this process uses a folder; until it is let go, or the process ends, nobody removes the folder."""

    _descriptor: int | None = None

    def __init__(self, folder: Path) -> None:
        """Make the folder where it is not there, and hold it. One that cannot be written is used without a sign.

        Raises:
            OSError: it cannot be made.
        """
        self._descriptor = _lock(folder, shared=True)
        with contextlib.suppress(OSError):
            os.utime(folder / LOCK)

    def let_go(self) -> None:
        """Use it no more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.let_go()


def _lock(folder: Path, *, shared: bool) -> int | None:
    """Lock an entry, shared with others or alone; None where that cannot be."""
    while True:
        if shared:
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(folder / LOCK)
        if descriptor is None:
            return None
        if fcntl is None:
            return descriptor if shared else _close(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is in use, or the disk knows no locks
            return descriptor if shared else _close(descriptor)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat(follow_symlinks=False)):
                return descriptor
        _close(descriptor)  # whoever removed the entry removed this file while we waited for it
        if not shared:
            return None


def _open(file: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with contextlib.suppress(OSError):
            return os.open(file, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    return None


def _close(descriptor: int) -> None:
    os.close(descriptor)


def hold_table(folder: Path) -> Hold | None:
    """Hold the folder of a table where it is one of ours; not where another program's cache has it."""
    return Hold(folder) if find_arrow() in folder.absolute().parents else None


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that every reader, on other machines too, sees all of it or what was there before.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    scratch = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(file), scratch.open("xb") as opened:
            opened.write(content)
        scratch.replace(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_plain(file: Path) -> bytes:
    """Read a file that may be anything: a pipe would be waited for, and a device never ends.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(file))
    return file.read_bytes()


def list_entries(kinds: Sequence[str] = tuple(KINDS)) -> list[Entry]:
    """What lies in the caches, the entry that was used last at the end."""
    found = [_measure(kind, path) for kind in kinds for path in _find_entries(kind)]
    return sorted((entry for entry in found if entry.count), key=lambda entry: entry.used)


def _find_entries(kind: str) -> Iterator[Path]:
    root = find_cache()
    if kind == PROGRAMS:
        placed = os.environ.get(PLACED, "0")
        yield from _list_folders(root / kind)
        yield from [Path(placed).absolute()] if placed not in ("", "0") else []
    elif kind == ARROW:
        yield from _find_tables(find_arrow())
    else:
        yield from (path for path in _list(root) if path.name.startswith(f"{kind}-") and not path.is_symlink())


def _find_tables(root: Path) -> Iterator[Path]:
    """The folders with Arrow files or what is said of them, finished or not, wherever `datasets` puts them."""
    for folder, _, names in [] if root.is_symlink() else os.walk(root, followlinks=False):
        if any(name.endswith(".arrow") or name == "dataset_info.json" for name in names):
            yield Path(folder)


def _list(folder: Path) -> list[Path]:
    try:
        return [] if folder.is_symlink() else sorted(folder.iterdir())
    except OSError:
        return []


def _list_folders(folder: Path) -> list[Path]:
    return [path for path in _list(folder) if path.is_dir() and not path.is_symlink()]


def _measure(kind: str, path: Path) -> Entry:
    size = count = 0
    used = 0.0
    for file in _walk(kind, path):
        with contextlib.suppress(OSError):
            status = file.stat(follow_symlinks=False)
            size, count, used = size + status.st_size, count + 1, max(used, status.st_mtime)
    with contextlib.suppress(OSError):
        used = max(used, (path / LOCK).stat(follow_symlinks=False).st_mtime)
    return Entry(kind, path, size, count, used)


def _walk(kind: str, path: Path) -> Iterator[Path]:
    """The files of an entry that are of its kind: plain ones, below it, by their names."""
    if not path.is_dir():
        yield from [path] if _is_ours(kind, path) else []
        return
    for folder, _, names in os.walk(path, followlinks=False):
        yield from (file for file in (Path(folder) / name for name in sorted(names)) if _is_ours(kind, file))


def _is_ours(kind: str, file: Path) -> bool:
    try:
        plain = stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False
    return plain and any(fnmatch(file.name, pattern) for pattern in KINDS[kind])


def remove(entry: Entry) -> bool:
    """Remove an entry's files, and its folders where nothing else is in them; False where a process uses it."""
    if not entry.path.is_dir():
        with contextlib.suppress(OSError):
            entry.path.unlink(missing_ok=True)
        return not entry.path.exists()
    locks = list[int]()
    try:
        # While a table is being written its folder is nobody's yet, so whoever writes one holds all of them.
        for folder in (find_arrow(), entry.path) if entry.kind == ARROW else (entry.path,):
            lock = _lock(folder, shared=False)
            if lock is None:
                return False
            locks.append(lock)
        _empty(entry)
    finally:
        for lock in locks:
            _close(lock)
    return True


def _empty(entry: Entry) -> None:
    for file in _walk(entry.kind, entry.path):
        with contextlib.suppress(OSError):
            file.unlink()
    below = [Path(folder) for folder, _, _ in os.walk(entry.path, topdown=False, followlinks=False)]
    above = list(entry.path.parents)[: len(entry.path.parts) - len(find_arrow().parts)] if entry.kind == ARROW else []
    # The locks of `datasets`, by which conversions that are under way wait for each other: there is none.
    locks = [file for folder in above for file in _list(folder) if file.suffix == ".lock" and _is_ours(ARROW, file)]
    for file in (entry.path / LOCK, *locks):
        with contextlib.suppress(OSError):
            file.unlink()
    for folder in [*below, *above]:
        with contextlib.suppress(OSError):  # files of others are in it
            folder.rmdir()


def read_bound() -> int:
    """Bytes that features, references and tables may take together.

    Raises:
        UserError: the environment says something that is no number above 0.
    """
    told = os.environ.get(BOUND, "")
    try:
        gib = float(told) if told else DEFAULT_GIB
    except ValueError:
        gib = 0.0
    if not 0 < gib * 2**30 < float("inf"):
        raise UserError(f"{BOUND} is {told!r}: it must be a number of GiB above 0")
    return int(gib * 2**30)


def trim(bound: int) -> list[Entry]:
    """Remove what was used longest ago until the rest fits `bound` bytes; what is in use stays.

    Returns:
        What was removed.
    """
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
