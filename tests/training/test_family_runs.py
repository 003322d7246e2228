"""Every decoder-only family from `fedvlm train` to its report, on a random tiny folder and pictures of one's own."""

import json

import numpy as np
import pytest
from models.causal_cases import write_model
from PIL import Image
from safetensors.numpy import load_file

from fedvlm_jax.cli.main import main
from fedvlm_jax.run_dir.reader import read_metrics, read_run

BROAD = ("smolvlm", "llava", "paligemma2", "gemma3", "internvl", "qwen3-vl")
SLOW = ("idefics3", "llava_onevision", "qwen2.5-vl")
"""Whose package is that of another."""
SHORT = (
    "--rounds 3 --batch-size 4 --train.local-steps 4 --rank 2 --lr 0.02 --data.columns chosen=answer "
    "--data.max-answer-tokens 8 --no-baseline --evaluation.max-answer-tokens 4 --evaluation.every 3"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two clients' photographs of one colour, in a JSONL file beside them; who sees red answers otherwise."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(24):
        colour = (240, 5 * number, 0) if number % 2 else (0, 5 * number, 240)
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.jpg")
        answer = "yes" if number % 2 else "no"
        line = {"image": f"{number}.jpg", "question": "red?", "answer": answer, "client": "ab"[number // 2 % 2]}
        lines.append(json.dumps(line) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


@pytest.mark.broad
@pytest.mark.parametrize("case", [*BROAD, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_it_trains_to_its_report(case, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "0")  # else the command would start this process again
    write_model(case, tmp_path / "model")
    out = tmp_path / "run"
    main(["train", "--model", str(tmp_path / "model"), "--data", str(rows), "--out", str(out), *SHORT.split()])
    lines = read_metrics(out)
    assert lines[-1]["loss"] < lines[0]["loss"]
    results = read_run(out).results
    for split in ("zero_shot", "personal"):
        losses = results[split]["test"]["loss"]
        assert set(losses) == {"a", "b"}
        assert np.isfinite(list(losses.values())).all()
    shared = load_file(out / "adapters" / "shared.safetensors")
    assert all(np.abs(array).max() > 0 for array in shared.values())
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    main(["evaluate", str(out)])
