"""What small runs of six methods end with, to the bit: moving the code about must change none of it.

The digests in `pins.json` were made by commit 929c416 and hold where float arithmetic is compiled alike: the same jax
and the same processor. `python tests/pins/test_pins.py` writes them anew; whoever does that says in docs/log.md by how
much the numbers moved and why.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from make_parquet import make_row, write_rows
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("pins.json")
TINY = (
    *(
        "--no-baseline",
        "--train.rounds",
        "4",
        "--train.local-steps",
        "2",
        "--train.batch-size",
        "4",
        "--lora.rank",
        "2",
    ),
    *("--evaluation.every", "2", "--evaluation.max-answer-tokens", "4", "--seed", "3"),
)
EMOJI = (
    *("--data.languages", "en", "de", "--data.vendors", "noto", "fluent", "--data.images-per-client", "6"),
    *("--data.validation-per-client", "2", "--data.test-per-client", "3", "--cohort", "3"),
)
RUNS = {
    "plora": ("--method", "plora", *EMOJI),
    "ditto": ("--method", "ditto", *EMOJI),
    "flora": ("--method", "flora", *EMOJI),
    "feddpa-t": ("--method", "feddpa-t", *EMOJI),
    "scaffold": ("--method", "fedavg-lora", "--local.scaffold", "--train.optimizer", "sgd", *EMOJI),
    "dpo": ("--method", "plora", "--objective", "dpo", "--data", "{pairs}"),
}


def describe_machine() -> dict[str, str]:
    """What float arithmetic depends on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line for line in lines if line.startswith("flags")), platform.processor())
    return {"jax": jax.__version__, "processor": hashlib.sha256(flags.encode()).hexdigest()[:12]}


def train(name: str, folder: Path) -> dict[str, object]:
    """Run `fedvlm train` in a process of its own, compiled as users have it; return what it left, as digests."""
    model, pairs = folder / "model", folder / "pairs.parquet"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
    if not model.exists():  # by another process: tests compile otherwise, and random weights would round otherwise
        make = f"import pathlib, tiny_run; tiny_run.make_folder(pathlib.Path({str(model)!r}))"
        paths = os.pathsep.join([str(FILE.parents[1]), os.environ.get("PYTHONPATH", "")])
        subprocess.run([sys.executable, "-c", make], env=kept | {"PYTHONPATH": paths}, check=True)
        rows = [
            make_row(n, client="ab"[n % 2], split=("train", "train", "validation", "test")[n // 2 % 4])
            for n in range(32)
        ]
        write_rows(pairs, rows)
    words = [word.format(pairs=pairs) for word in RUNS[name]]
    out = folder / name
    command = [sys.executable, "-m", "fedvlm_jax", "train", *words, *TINY, "--model", str(model), "--out", str(out)]
    done = subprocess.run(command, env=kept | {"FEDVLM_CACHE": str(folder / "cache")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256()
    for path in sorted((out / "adapters").rglob("*.safetensors")):
        if path.parent.name == "global":  # there were none when the digests were made
            continue
        digest.update(str(path.relative_to(out)).encode())
        for key, array in sorted(load_file(path).items()):
            digest.update(f"{key}{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    return {
        "adapters": digest.hexdigest(),
        "results": hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest(),
        "bytes": [[line["bytes_up_per_client"], line["bytes_down_per_client"]] for line in lines],
        "losses": [line["loss"] for line in lines],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pins")


@pytest.mark.parametrize("name", RUNS)
def test_numbers_are_what_they_were(name, folder):
    pinned, now = json.loads(FILE.read_text()), train(name, folder)
    assert now["bytes"] == pinned[name]["bytes"]
    np.testing.assert_allclose(now["losses"], pinned[name]["losses"], rtol=1e-4)
    if pinned["machine"] == describe_machine():
        assert now == pinned[name]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        pins = {name: train(name, Path(place)) for name in RUNS}
    lines = (
        f" {json.dumps(key)}: {json.dumps(value)}" for key, value in ({"machine": describe_machine()} | pins).items()
    )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
