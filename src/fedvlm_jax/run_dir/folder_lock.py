"""Folders that one process at a time may write into.

A folder is claimed by a lock on a file in it. The kernel holds the lock, so it ends with its process, however that
ends; Linux hands it on to the server of a network disk, so it counts between machines, unless the disk is mounted with
locks that are local. Where a file system has no locks, a folder that can be made only once stands in for one; after a
kill it is taken over on the same machine, while elsewhere nobody can know, and the message says what to delete.
"""

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fedvlm_jax.errors import UserError, describe_os_error, naming
from fedvlm_jax.utils.files import read_plain
from fedvlm_jax.utils.untrusted_text import clean, cut

LOCK = ".lock"
"""The file that is locked; it says who has the folder, and goes when they leave."""

STAND_IN = ".held"
"""The folder that stands in for a lock."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claim:
    """A folder that is this process's to write into, until it leaves."""

    def __init__(self, folder: Path) -> None:
        """Make the folder where there is none, try whether it can be written into, and claim it.

        Raises:
            UserError: it cannot be made or written into, or another process has it: which one.
        """
        self.folder = folder
        self._stand_in = False
        try:
            self._made = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
            try:
                self._write_holder()
            except BaseException:
                self.leave()
                raise
        except OSError as error:
            raise UserError(_describe_refusal(folder, error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def move(self, target: Path) -> None:
        """Give the folder another name; it stays claimed.

        Raises:
            UserError: something has that name.
        """
        try:
            self.folder.rename(target)
        except OSError as error:
            raise UserError(_describe_refusal(target, error)) from None
        self.folder = target

    def leave(self) -> None:
        """Let others have it; a folder that was made for nothing goes."""
        # The file goes before its lock: whoever waits for it then finds that the path leads to another file.
        with suppress(OSError):
            (self.folder / LOCK).unlink()
            if self._stand_in:
                (self.folder / STAND_IN).rmdir()
        os.close(self._file)
        if self._made:
            remove_unused(self.folder)

    def _open(self) -> int:
        """Open and lock the file that is at the lock's path then, and return its descriptor."""
        path = self.folder / LOCK
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._lock(file)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), path.stat()):
                        return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # of somebody who has left: the name is another file's by now

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            raise UserError(_describe_holder(self.folder)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        held = self.folder / STAND_IN
        try:
            held.mkdir()
        except FileExistsError:
            if not _has_ended(_read_holder(self.folder)):
                raise UserError(f"{_describe_holder(self.folder)}; if it is gone, delete {held}") from None
        self._stand_in = True

    def _write_holder(self) -> None:
        """Write who has the folder, which also shows whether the disk takes what is written."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = {"host": platform.node(), "process": os.getpid(), "since": since, "command": name_command()}
        with naming(self.folder / LOCK):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(holder).encode(), 0)
            os.fsync(self._file)  # a network disk may refuse only now


def make_folder(name: str, now: datetime | None = None) -> Path:
    """Make a new folder for a command that was given none: `runs/<time>-<name>`, or the same with "-2", "-3", …

    Raises:
        UserError: none can be made there.
    """
    first = folder = Path("runs", f"{now or datetime.now():%Y-%m-%d-%H%M%S}-{name}")
    number = 1
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):  # another command's, begun in the same second
                folder.mkdir()
                return folder
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
    except OSError as error:
        raise UserError(f"no folder can be made here: {describe_os_error(error)}; say where with --out") from None


@contextmanager
def choose_folder(out: Path | None, name: str) -> Generator[Path]:
    """Give `out`, or a new folder, which is removed at the end where nothing came to lie in it.

    Raises:
        UserError: none can be made.
    """
    folder = out or make_folder(name)
    try:
        yield folder
    finally:
        if out is None:
            remove_unused(folder)


@contextmanager
def open_folder(out: Path | None, name: str) -> Generator[Path]:
    """Choose a folder and claim it.

    Raises:
        UserError: as `Claim`.
    """
    with choose_folder(out, name) as folder, Claim(folder):
        yield folder


def remove_unused(folder: Path) -> None:
    """Remove a folder in which nothing came to lie."""
    with suppress(OSError):  # there is something in it
        folder.rmdir()


def is_used(folder: Path) -> bool:
    """Tell whether there is anything in a folder beside a claim."""
    return any(path.name not in (LOCK, STAND_IN) for path in folder.iterdir())


def clear(folder: Path) -> None:
    """Remove all that is in a folder beside the claim."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name != STAND_IN:
            shutil.rmtree(path)
        elif path.name not in (LOCK, STAND_IN):
            path.unlink()


def name_command(words: Sequence[str] | None = None) -> str:
    """Return the command that was given (`sys.argv` by default), as a shell takes it, but for secrets.

    >>> name_command(["/bin/flwr-serverapp", "--token", "5e", "--insecure"])
    'flwr-serverapp --token ... --insecure'
    """
    first, *others = sys.argv if words is None else words
    # Flower gives its processes a token in this way, and what is written here is shown in reports.
    shown = ["..." if before == "--token" else word for before, word in zip(["", *others], others, strict=False)]
    name = Path(first).name
    return shlex.join(["fedvlm" if name == "__main__.py" else name, *shown])


def _describe_refusal(folder: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{folder}: a file is there, or above it, and a folder is needed; choose another with --out"
    return f"nothing can be written into {folder}: {describe_os_error(error)}"


def _describe_holder(folder: Path) -> str:
    holder = _read_holder(folder)
    if not holder:
        return f"{folder} is in use by another process"
    # The file may say anything, and of any length.
    process, host, since, command = (
        cut(clean(str(holder.get(name, "unknown"))[:121]), 120) for name in ("process", "host", "since", "command")
    )
    return (
        f"{folder} is in use: process {process} on {host} has it since {since} ({command}). Wait for it, stop it, or "
        "choose another folder"
    )


def _read_holder(folder: Path) -> Mapping[str, Any]:
    """Read what the lock file says; empty where it says nothing that can be read."""
    try:
        holder = json.loads(read_plain(folder / LOCK))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _has_ended(holder: Mapping[str, Any]) -> bool:
    """Tell whether a process is known to be gone. Of another machine nobody knows."""
    process = holder.get("process")
    if holder.get("host") != platform.node() or type(process) is not int or process <= 0:
        return False
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False
