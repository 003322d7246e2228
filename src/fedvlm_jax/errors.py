"""The exception that means "the input is at fault, not the program", and messages of damage and faults of the disk."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Bad input, refused at the boundary: the value, what was expected, and how to mend it.

    The command line prints it as one message without a traceback and exits with 2. Library users catch a `ValueError`.
    """


class DamagedError(UserError):
    """A file does not hold what was written into it."""


def check_utf8(what: str, text: str) -> None:
    """Refuse a text that no JSON file holds, and that libraries take for damage of the file that it names.

    Raises:
        UserError: it has bytes that are no UTF-8, as names of files in an older encoding have.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} {text!r} has bytes that are no UTF-8: give that another name") from None


ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or have the quota raised",
    errno.EFBIG: "the largest size of a file is limited there; raise it (ulimit -f), or choose another folder",
    errno.EACCES: "choose a folder that you may use, or have its permissions changed",
    errno.EPERM: "choose a folder that you may use, or have its permissions changed",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "something else has that name; choose another",
    errno.ENOTDIR: "a file is where a folder should be; choose another",
    errno.EISDIR: "a folder is where a file should be; choose another",
    errno.ELOOP: "its links lead to each other; choose another",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EIO: "the disk fails; look at the system's log, or choose another disk",
    errno.ESTALE: "the network disk has forgotten the file; mount it anew",
}
"""What to do about an error of the operating system."""


def describe_os_error(error: OSError) -> str:
    """Say in a line which file it was, what is wrong with it, and what to do.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device", "run/results.json"))
    'run/results.json: No space left on device (free some space there)'
    """
    if error.errno is None:
        return (str(error) or type(error).__name__).splitlines()[0]
    where = f"{error.filename!s}: " if error.filename else ""
    name, advice = error.strerror or str(error), ADVICE.get(error.errno)
    return f"{where}{name}" + (f" ({advice})" if advice else "")


def explain_error(error: BaseException) -> str:
    """Write an exception as one line of at most 300 characters, its kind first unless it is a message of ours.

    >>> explain_error(OSError("disk  full"))
    'OSError: disk full'
    """
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return text if len(text) <= 300 else f"{text[:299]}…"


def find_machine_fault(error: BaseException) -> OSError | MemoryError | None:
    """Find the fault of the machine, not of a file's content, that an exception is or was caused by; None if none is.

    No memory, a full disk, too many open files: the same work may succeed later, and nothing is known to be damaged.
    """
    # A damaged file may cause these itself: libraries raise without a number, a mapping of nothing is EINVAL.
    of_files = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno not in of_files):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def naming(path: Path | str) -> Generator[None]:
    """Have an `OSError` of the block name a file: what is raised by writing does not know which one it was.

    Raises:
        OSError: that of the block, with `path` as its file where it named none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def format_count(number: float, one: str, many: str = "") -> str:
    """Write a number of things, for messages.

    >>> format_count(1, "client"), format_count(1200, "client"), format_count(2, "class", "classes")
    ('1 client', '1,200 clients', '2 classes')
    >>> format_count(2.5, "second")
    '2.5 seconds'

    Args:
        number: of them.
        one: the noun of a single one, with what agrees with it.
        many: of several; with an "s" unless it is given.
    """
    written = f"{number:,g}" if isinstance(number, float) else f"{number:,}"
    return f"{written} {one if number == 1 else many or one + 's'}"
