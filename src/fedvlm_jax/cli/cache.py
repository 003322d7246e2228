"""`fedvlm cache`: what is kept of earlier commands, and its removal."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

import tyro

from fedvlm_jax.errors import format_count
from fedvlm_jax.utils import cache_folders

Kind = Literal["programs", "features", "reference", "arrow", "contents"]


def cache(
    clear: Annotated[
        tuple[Kind, ...] | None,
        tyro.conf.arg(metavar="[KIND ...]", help_behavior_hint="(default: nothing; without a kind: all of them)"),
    ] = None,
) -> None:
    """Show what earlier commands left to be found again: where it is, how large, when it was used last; or remove it.

    All of it can be made again. What another process uses stays, and so do files that are not from here; links are not
    followed.

    Args:
        clear: the kinds to remove: `programs` (compiled), `features` (of images), `reference` (log-probabilities),
            `arrow` (tables) and `contents` (digests of files).
    """
    bound = write_size(cache_folders.read_bound())
    if clear is not None:
        for kind in clear or cache_folders.KINDS:
            entries = cache_folders.list_entries([kind])
            gone = [entry for entry in entries if cache_folders.remove(entry)]
            stay = [str(entry.path) for entry in entries if entry not in gone]
            rest = f"; {len(stay)} used by running processes stay: {', '.join(stay)}" if stay else ""
            print(f"{kind:10} removed {_sum(gone)}{rest}")
        return
    places = f"{cache_folders.find_cache()} ({cache_folders.FOLDER}), tables in {cache_folders.find_arrow()}"
    print(f"{places}; beside programs at most {bound} ({cache_folders.BOUND})\n")
    for kind in cache_folders.KINDS:
        entries = cache_folders.list_entries([kind])
        print(f"{kind:10} {_sum(entries)}")
        for entry in reversed(entries):
            used = datetime.fromtimestamp(entry.used).astimezone().isoformat(" ", "minutes")[:16]
            print(f"    {write_size(entry.size):>9}  used last {used}  {entry.path}")


def _sum(entries: Sequence[cache_folders.Entry]) -> str:
    files = sum(entry.count for entry in entries)
    return (
        f"{write_size(sum(entry.size for entry in entries))} in {format_count(files, 'file')} of "
        f"{format_count(len(entries), 'folder')}"
    )


def write_size(count: int) -> str:
    """Write a number of bytes in MiB or, from 1 GiB, in GiB.

    >>> write_size(3 * 2**29), write_size(2**19)
    ('1.5 GiB', '0.5 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
