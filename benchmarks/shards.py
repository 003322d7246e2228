"""Does memory stay flat while a federation trains over gigabytes of parquet shards?

    python benchmarks/shards.py                  # 6 GiB of synthetic shards; about as much again in the data sets cache
    python benchmarks/shards.py --gigabytes 0.2  # to try it

Writes shards of RLAIF-V's form (noise pictures; nothing pretends to be RLAIF-V), runs `fedvlm train` on them with their
sources as clients, every training row once, and watches the process from outside. Ends with an error above the bound.
"""

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from harness.command import name_command
from memory import GIB, watch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from rlaif_form import SOURCES, write_stream  # noqa: E402

from fedvlm_jax.run_dir.artifacts import describe_environment  # noqa: E402
from fedvlm_jax.utils.files import write_json  # noqa: E402

ROUNDS = 6
BATCH = 16


@dataclass(frozen=True)
class Options:
    """What may be chosen."""

    gigabytes: float = 6.0
    """Size of the shards, in GiB."""
    bound: float = 3.0
    """Most GiB of resident memory; the model that ships weighs 14 MB, so it is not taken off."""
    work: Path | None = None
    """Folder for shards, caches and the run (default: a temporary one, removed at the end)."""


def main() -> None:
    """Write the shards, train, and say what memory did."""
    options = tyro.cli(Options, description=__doc__)
    work = options.work or Path(tempfile.mkdtemp(prefix="fedvlm-shards-"))
    try:
        result = measure(options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results" / "shards.json", {**result, **describe_environment()})
    print(json.dumps(result, indent=1))
    if result["peak_gib"] > options.bound:
        sys.exit(f"resident memory reached {result['peak_gib']} GiB, more than {options.bound}")


def measure(options: Options, work: Path) -> dict[str, object]:
    """One run, from shards to results."""
    shards, run = work / "shards", work / "run"
    if not shards.exists():
        write_stream(shards, options.gigabytes)
    size = sum(file.stat().st_size for file in shards.glob("*.parquet"))
    rows = size // 200_000
    steps = max(1, round(0.8 * rows / len(SOURCES) / ROUNDS / BATCH))
    command = [
        *(sys.executable, "-m", "fedvlm_jax", "train", "--data", "rlaif-v", "--data.path", str(shards)),
        *("--out", str(run), "--train.rounds", str(ROUNDS), "--train.local-steps", str(steps)),
        *("--train.batch-size", str(BATCH), "--evaluation.every", str(ROUNDS), "--checkpoint-every", "1"),
        *("--system.cache", "disk", "--system.cache-dir", str(work / "features")),
    ]

    def phase() -> str:
        lines = run / "metrics.jsonl"
        done = lines.read_bytes().count(b"\n") if lines.exists() else 0
        if not (run / "config.json").exists():
            return "reading"
        return f"round {done + 1}" if done < ROUNDS else "evaluation"

    seen = watch(command, phase, {"HF_DATASETS_CACHE": str(work / "datasets")})
    if seen.status:
        sys.exit(f"training ended with {seen.status}")
    by_round = [
        statistics.median(s.gib["RssAnon"] for s in seen.samples if s.phase == f"round {number}")
        for number in range(1, ROUNDS + 1)
    ]
    return {
        "command": name_command(),
        "shards_gib": round(size / GIB, 2),
        "rows": int(rows),
        "seconds": round(seen.seconds),
        "peak_gib": round(seen.peak(), 2),
        "peak_anonymous_gib": round(seen.peak("RssAnon"), 2),
        "peak_by_phase_gib": {name: round(seen.peak("VmRSS", name), 2) for name in seen.phases()},
        "median_anonymous_by_round_gib": [round(value, 3) for value in by_round],
    }


if __name__ == "__main__":
    main()
