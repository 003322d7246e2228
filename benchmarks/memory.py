"""Run a command and watch the memory of its process from outside, as `/proc` tells it.

Resident memory is what `VmRSS` says: anonymous memory and the pages of mapped files that happen to be in memory. The
latter can be taken away at any time, so both are kept apart.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30
FIELDS = ("VmRSS", "RssAnon", "RssFile")


@dataclass(frozen=True)
class Sample:
    """Seconds since the start, what the process was doing, and GiB of `FIELDS`."""

    second: float
    phase: str
    gib: Mapping[str, float]


@dataclass
class Watched:
    """A process that ended: its exit status, its last lines, its memory over time."""

    status: int = -1
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def peak(self, name: str = "VmRSS", phase: str | None = None) -> float:
        """Most GiB, in all or in one phase; 0 where nothing was seen."""
        return max((s.gib[name] for s in self.samples if phase in (None, s.phase)), default=0.0)

    def phases(self) -> list[str]:
        """In the order of their first sample."""
        return list(dict.fromkeys(sample.phase for sample in self.samples))


def watch(
    command: Sequence[str], phase: Callable[[], str], environment: Mapping[str, str] | None = None, every: float = 0.25
) -> Watched:
    """Run `command` to its end, showing what it writes, and look at its memory every `every` seconds."""
    seen, start = Watched(), time.perf_counter()
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def look() -> None:
        while process.poll() is None:
            if gib := _read(process.pid):
                seen.samples.append(Sample(time.perf_counter() - start, phase(), gib))
            time.sleep(every)

    looking = threading.Thread(target=look)
    looking.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        seen.lines.append(line.rstrip())
    seen.status = process.wait()
    looking.join()
    seen.seconds = time.perf_counter() - start
    return seen


def _read(pid: int) -> dict[str, float]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.partition(":")[0] in FIELDS}
    return {name: int(kib) * 1024 / GIB for name, kib in found.items()} if len(found) == len(FIELDS) else {}
