"""Florence-2-base at its real size on this machine: memory, and what keeping frozen image features saves.

    python benchmarks/base_size.py

The checkpoint has Florence-2-base's shape (231 M parameters, pictures of 768x768, 577 image tokens) and random weights,
because the real ones could not be had; the tokenizer is that of the model that ships. Four clients, batch 1, rows of
RLAIF-V's form, a picture each; a round is an epoch. A first run of one round fills XLA's cache of compiled programs, so
that in the second run, which counts, no epoch pays for compiling. Ends with an error if resident memory passes the
bound or if the second epoch is not twice as fast as the first.
"""

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from harness.bases import make_florence
from harness.command import name_command
from memory import Watched, watch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from rlaif_form import Form, write_folder  # noqa: E402

from fedvlm_jax.run_dir.artifacts import describe_environment  # noqa: E402
from fedvlm_jax.run_dir.reader import read_metrics  # noqa: E402
from fedvlm_jax.utils.files import write_json  # noqa: E402

CLIENTS = 4


@dataclass(frozen=True)
class Options:
    """What may be chosen."""

    rows: int = 10
    """Rows per client; about six tenths of them train, and a round has as many steps."""
    epochs: int = 3
    bound: float = 12.0
    """Most GiB of resident memory."""
    work: Path | None = None
    """Folder for the checkpoint, data, caches and runs (default: a temporary one, removed at the end)."""


def main() -> None:
    """Make the checkpoint and the data, train twice, and say what came out."""
    options = tyro.cli(Options, description=__doc__)
    work = options.work or Path(tempfile.mkdtemp(prefix="fedvlm-base-"))
    try:
        result = measure(options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results" / "base_size.json", {**result, **describe_environment()})
    print(json.dumps(result, indent=1))
    if result["peak_gib"] > options.bound:
        sys.exit(f"resident memory reached {result['peak_gib']} GiB, more than {options.bound}")
    if result["first_epoch_over_later"] < 2:
        sys.exit(f"later epochs are only {result['first_epoch_over_later']} times as fast as the first")


def measure(options: Options, work: Path) -> dict[str, float | str | list[float]]:
    """Two runs; the second counts."""
    if not (work / "model" / "model.safetensors").exists():
        make_florence(work / "model")
    if not (work / "data").exists():
        sources = {f"made-up-{number}": 1 / CLIENTS for number in range(CLIENTS)}
        write_folder(work / "data", Form(rows=CLIENTS * options.rows, sources=sources, questions_per_image=1))
    for name in ("warm", "run", "features-warm", "features-run"):
        shutil.rmtree(work / name, ignore_errors=True)
    _train(options, work, "warm", 1)
    seen = _train(options, work, "run", options.epochs)
    seconds = [line["seconds"] for line in read_metrics(work / "run")]
    later = statistics.median(seconds[1:])
    return {
        "command": name_command(),
        "peak_gib": round(seen.peak(), 2),
        "peak_by_phase_gib": {name: round(seen.peak("VmRSS", name), 2) for name in seen.phases()},
        "seconds_by_epoch": [round(value, 1) for value in seconds],
        "first_epoch_over_later": round(seconds[0] / later, 2),
    }


def _train(options: Options, work: Path, name: str, epochs: int) -> Watched:
    run = work / name
    command = [
        *(sys.executable, "-m", "fedvlm_jax", "train", "--model", str(work / "model"), "--out", str(run)),
        *("--data", "rlaif-v", "--data.path", str(work / "data"), "--train.rounds", str(epochs)),
        *(
            "--train.local-steps",
            str(options.rows * 6 // 10),
            "--train.batch-size",
            "1",
            "--evaluation.batch-size",
            "1",
        ),
        *("--evaluation.every", str(epochs), "--evaluation.max-answer-tokens", "8"),
        *("--evaluation.no-before-redistribution", "--data.max-answer-tokens", "64"),
        *("--system.cache", "disk", "--system.cache-dir", str(work / f"features-{name}")),
    ]

    def phase() -> str:
        if not (run / "config.json").exists():
            return "reading"
        done = len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
        return f"epoch {done + 1}" if done < epochs else "evaluation"

    caches = {"JAX_COMPILATION_CACHE_DIR": str(work / "xla"), "HF_DATASETS_CACHE": str(work / "datasets")}
    seen = watch(command, phase, caches)
    if seen.status:
        sys.exit(f"training ended with {seen.status}")
    return seen


if __name__ == "__main__":
    main()
