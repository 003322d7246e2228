"""Processor time of a process with all that it started, from Linux's /proc."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Stat(NamedTuple):
    """A process: its number, its parent's, and the seconds that it and the children it has waited for took."""

    pid: int
    parent: int
    seconds: float


def count_tree_seconds(root: int) -> float:
    """Return the processor seconds of a process and its descendants, of those too that ended and were waited for.

    What ends between two calls without being waited for, or whose parent has ended, is not counted.

    Raises:
        ProcessLookupError: there is no such process.
    """
    stats = {stat.pid: stat for stat in _read_stats()}
    if root not in stats:
        raise ProcessLookupError(f"no process {root}")
    children: dict[int, list[int]] = defaultdict(list)
    for stat in stats.values():
        children[stat.parent].append(stat.pid)
    total, left = 0.0, [root]
    while left:
        pid = left.pop()
        total += stats[pid].seconds
        left += children[pid]
    return total


def _read_stats() -> Iterator[Stat]:
    tick = os.sysconf("SC_CLK_TCK")
    for file in PROC.glob("[0-9]*/stat"):
        try:
            text = file.read_text()
        except OSError:
            continue  # it has ended
        # The name, in brackets, may hold anything; fields are counted behind it (proc(5): 4 is the parent, 14 to 17
        # are the times).
        fields = text.rpartition(")")[2].split()
        yield Stat(int(file.parent.name), int(fields[1]), sum(map(int, fields[11:15])) / tick)
