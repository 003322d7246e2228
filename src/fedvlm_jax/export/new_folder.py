"""A folder that is there whole or not at all: written beside its place, and renamed."""

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

    Raises:
        UserError: as `check_free`.
    """
    check_free(out, flag)
    new = [parent for parent in out.parents if not parent.exists()]
    scratch = out.with_name(f".{out.name[:100]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with naming(scratch):
            scratch.mkdir()
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
