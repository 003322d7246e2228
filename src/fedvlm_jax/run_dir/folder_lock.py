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
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedvlm_jax.config.run_options import name_folder
from fedvlm_jax.errors import UserError, describe_os_error, naming
from fedvlm_jax.utils.files import read_plain
from fedvlm_jax.utils.untrusted_text import clean

LOCK = ".lock"
"""The file that is locked; it says who has the folder, and goes when they leave."""

STAND_IN = ".held"
"""The folder that stands in for a lock."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

LONGEST = 120
"""Characters of what others wrote that are told."""


class Claim:
    """A folder that is this process's to write into, until it leaves.

    Attributes:
        folder: which one.
    """

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
            self._file = self._take()
            try:
                self._sign()
            except BaseException:
                self.leave()
                raise
        except OSError as error:
            raise UserError(_describe_refusal(folder, error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        with suppress(OSError):
            (self.folder / LOCK).unlink()
            if self._stand_in:
                (self.folder / STAND_IN).rmdir()
        os.close(self._file)
        if self._made:
            remove_unused(self.folder)

    def _take(self) -> int:
        path = self.folder / LOCK
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._lock(file)
                if _is_at(file, path):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # of somebody who has left: the name is another file's by now

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_describe_holder(self.folder)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._hold()

    def _hold(self) -> None:
        held = self.folder / STAND_IN
        try:
            held.mkdir()
        except FileExistsError:
            if not _has_ended(_read_holder(self.folder)):
                raise UserError(f"{_describe_holder(self.folder)}; if it is gone, delete {held}") from None
        self._stand_in = True

    def _sign(self) -> None:
        """Write who has the folder, which also shows whether the disk takes what is written."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = {"host": platform.node(), "process": os.getpid(), "since": since, "command": name_command()}
        with naming(self.folder / LOCK):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(holder).encode(), 0)
            os.fsync(self._file)


def make_folder(name: str, now: datetime | None = None) -> Path:
    """Make a folder of its own for a command that was given none: `runs/<time>-<name>`, or the same with "-2", "-3", …

    Raises:
        UserError: none can be made there.
    """
    first = name_folder(name, now or datetime.now())
    names = chain([first.name], (f"{first.name}-{number}" for number in count(2)))
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        return next(filter(_make, map(first.with_name, names)))
    except OSError as error:
        raise UserError(f"no folder can be made here: {describe_os_error(error)}; say where with --out") from None


@contextmanager
def choose_folder(out: Path | None, name: str) -> Generator[Path]:
    """`out`, or a folder with a name of its own, which goes where nothing came to lie in it.

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
    """Take a folder away in which nothing came to lie."""
    with suppress(OSError):  # there is something in it
        folder.rmdir()


def is_used(folder: Path) -> bool:
    """Is there anything in it beside a claim?"""
    return any(path.name not in (LOCK, STAND_IN) for path in folder.iterdir())


def clear(folder: Path) -> None:
    """Take away all that is in a folder beside the claim."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name != STAND_IN:
            shutil.rmtree(path)
        elif path.name not in (LOCK, STAND_IN):
            path.unlink()


def _make(folder: Path) -> bool:
    """Make a folder, unless the name is taken."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Does the path still lead to this open file?"""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def name_command() -> str:
    """Return the command that was given, as a shell takes it."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(["fedvlm" if words[0] == "__main__.py" else words[0], *words[1:]])


def _describe_refusal(folder: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{folder}: a file is there, or above it, and a folder is needed; choose another with --out"
    return f"nothing can be written into {folder}: {describe_os_error(error)}"


def _describe_holder(folder: Path) -> str:
    holder = _read_holder(folder)
    if not holder:
        return f"{folder} is in use by another process"
    told = {name: _cut(holder.get(name, "unknown")) for name in ("process", "host", "since", "command")}
    return (
        f"{folder} is in use: process {told['process']} on {told['host']} has it since {told['since']} "
        f"({told['command']}). Wait for it, stop it, or choose another folder"
    )


def _cut(value: object) -> str:
    """A value out of somebody's file, as a terminal may have it."""
    text = clean(str(value)[: LONGEST + 1])
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _read_holder(folder: Path) -> Mapping[str, Any]:
    """What the lock file says; nothing where it says nothing that can be read."""
    try:
        holder = json.loads(read_plain(folder / LOCK))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _has_ended(holder: Mapping[str, Any]) -> bool:
    """Is it known that this process is gone? Of another machine nobody knows."""
    process = holder.get("process")
    if holder.get("host") != platform.node() or type(process) is not int or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False
