"""A folder that is there whole or not at all: written beside its place, and renamed."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedvlm_jax.errors import UserError, naming


def check_free(out: Path, flag: str = "--out") -> None:
    """Refuse a place where something is already, or where no folder can get its name; `flag` chooses another.

    Raises:
        UserError: it is a file, a link, a folder that is not empty or cannot be replaced, or it is below a file.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is no folder, or a link to one: choose another {flag}")
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another {flag}")
        place = out.resolve()
        if place == Path.cwd() or place.is_mount():
            kind = "the top of a disk" if place.is_mount() else "the working folder"
            raise UserError(f"{out} is {kind}, which cannot be replaced by what is written: name a folder in it")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file, so there is no folder in it: choose another {flag}")


@contextmanager
def write_beside(out: Path, flag: str = "--out") -> Generator[Path]:
    """Give a folder to write into, which gets its name when the block ends, and goes when the block fails.

    One that a kill left behind goes when the same place is written to again.

    Raises:
        UserError: as `check_free`.
    """
    check_free(out, flag)
    new = [parent for parent in out.parents if not parent.exists()]
    begin = f".{out.name[:100]}."
    scratch, held = out.with_name(f"{begin}{uuid.uuid4().hex[:8]}.tmp"), -1
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep_left(out.parent, begin)
        with naming(scratch):
            scratch.mkdir()
            held = _hold(scratch)
        yield scratch
        check_free(out, flag)
        if out.is_dir():
            out.rmdir()
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in new:
            with suppress(OSError):  # somebody else may have put something there
                parent.rmdir()
        raise
    finally:
        if held >= 0:
            os.close(held)


def sweep_left(folder: Path, begin: str) -> None:
    """Remove the folders whose names begin so and that nobody writes into any more."""
    for left in folder.iterdir():
        if re.fullmatch(re.escape(begin) + r"[0-9a-f]{8}\.tmp", left.name) and not left.is_symlink():
            with suppress(OSError):  # somebody writes into it, or it is not ours to remove
                held = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(held)


def _hold(folder: Path) -> int:
    """Lock a folder for as long as the descriptor that is returned is open; -1 where the disk has no locks."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return -1
    return held
