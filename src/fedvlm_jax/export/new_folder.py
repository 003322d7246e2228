"""A folder that is there whole or not at all: written beside its place, and renamed."""

import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fedvlm_jax.errors import UserError, naming


def check_free(out: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        UserError: it is a file, or a folder that is not empty.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is no folder: choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out")


@contextmanager
def write_beside(out: Path) -> Generator[Path]:
    """Give a folder to write into, which gets its name when the block ends, and goes when the block fails.

    Raises:
        UserError: as `check_free`.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(scratch):
            scratch.mkdir()
        yield scratch
        check_free(out)
        if out.is_dir():
            out.rmdir()
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
