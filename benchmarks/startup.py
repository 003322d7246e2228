"""How long one waits: for `fedvlm --help`, and for the first round of `fedvlm train`, with nothing compiled and again.

    python benchmarks/startup.py [--repeats 7] [--starts 3]

`--help` is run in turn with an empty Python, because of a process's start the interpreter is not ours to shorten. The
start of a run is timed from its process's start to two of its lines: that which says that rounds begin, and that of
the first finished round; then it is ended. `cold`: nothing is in the compilation cache; `warm`: what the cold one left
is. Writes results/startup.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from harness.command import name_command
from harness.machine import describe_machine
from harness.timing import describe_times, interleave, ratio

from fedvlm_jax.utils.compilation_cache import FOLDER, SWITCH
from fedvlm_jax.utils.files import write_json

RESULTS = Path(__file__).parent / "results"
BEGINS, FIRST = ("rounds", "round 1/")
FEDVLM = (sys.executable, "-m", "fedvlm_jax")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 7
    """Of `--help`, in turn with an empty Python."""
    starts: int = 3
    """Of a run, each with an empty cache and then with what that left."""
    train: tuple[str, ...] = ()
    """Further options of `fedvlm train`, as --train=--data.images-per-client --train=20 gives them."""
    out: Path = RESULTS / "startup.json"
    """Where the numbers go."""


def main() -> None:
    """Measure and write."""
    options = tyro.cli(Options, description=__doc__)
    times = interleave({"help": lambda: time_command(*FEDVLM, "--help"), "python": time_empty}, options.repeats)
    print("help", describe_times(times["help"]), "python", describe_times(times["python"]), flush=True)
    starts: dict[str, list[Mapping[str, float]]] = {"cold": [], "warm": []}
    for _ in range(options.starts):
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("cold", "warm"):
                starts[name].append(time_start(Path(scratch), name, options.train))
                print(name, json.dumps(starts[name][-1]), flush=True)
    write_json(options.out, describe(options, times, starts))
    print(options.out)


def describe(
    options: Options, times: Mapping[str, list[float]], starts: Mapping[str, list[Mapping[str, float]]]
) -> dict[str, Any]:
    """What goes into the file."""
    return {
        "command": name_command(),
        "train": list(options.train),
        "help_seconds": describe_times(times["help"]),
        "python_seconds": describe_times(times["python"]),
        "help_over_python": round(ratio(times["help"], times["python"]), 2),
        "first_round": {
            name: {what: describe_times([one[what] for one in found]) for what in found[0]}
            for name, found in starts.items()
        },
        "load": [round(value, 2) for value in os.getloadavg()],
        **describe_machine(),
    }


def time_command(*words: str) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def time_empty() -> float:
    """Seconds of a Python that does nothing."""
    return time_command(sys.executable, "-c", "pass")


def time_start(scratch: Path, name: str, more: tuple[str, ...]) -> dict[str, float]:
    """Seconds from the start of `fedvlm train` until rounds begin, and until the first one is finished."""
    environment = {key: value for key, value in os.environ.items() if key != FOLDER}
    environment |= {SWITCH: str(scratch / "programs"), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    began = time.perf_counter()
    with subprocess.Popen(
        [*FEDVLM, "train", "--out", str(scratch / name), *more],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        found: dict[str, float] = {}
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            seconds = time.perf_counter() - began
            lines.append(line.rstrip())
            if line.rstrip().endswith(BEGINS):
                found["begins"] = seconds
            elif line.startswith(FIRST):
                found["first_round"] = seconds
                process.kill()
                break
    if len(found) < 2:
        sys.exit("the run ended before its first round:\n" + "\n".join(lines))
    return found


if __name__ == "__main__":
    main()
