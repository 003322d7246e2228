"""`fedvlm cache`: what is kept of earlier commands, and its removal."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

import tyro

from fedvlm_jax.utils.cache_folders import (
    BOUND,
    FOLDER,
    KINDS,
    Entry,
    find_arrow,
    find_cache,
    list_entries,
    read_bound,
    remove,
)

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
    bound = read_bound()
    if clear is not None:
        for kind in clear or KINDS:
            print(_clear(kind))
        return
    print(f"{find_cache()} ({FOLDER}), tables in {find_arrow()}; beside programs at most {_size(bound)} ({BOUND})\n")
    for kind in KINDS:
        print("\n".join(_describe(kind, list_entries([kind]))))


def _describe(kind: str, entries: Sequence[Entry]) -> list[str]:
    lines = [f"{kind:10} {_sum(entries)}"]
    return lines + [f"    {_size(e.size):>9}  used last {_date(e.used)}  {e.path}" for e in reversed(entries)]


def _clear(kind: str) -> str:
    entries = list_entries([kind])
    gone = [entry for entry in entries if remove(entry)]
    stay = [entry for entry in entries if entry not in gone]
    told = f"; {len(stay)} used by running processes stay: {', '.join(str(e.path) for e in stay)}" if stay else ""
    return f"{kind:10} removed {_sum(gone)}{told}"


def _sum(entries: Sequence[Entry]) -> str:
    files = sum(entry.count for entry in entries)
    return f"{_size(sum(entry.size for entry in entries))} in {files} files of {len(entries)} folders"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")[:16]
