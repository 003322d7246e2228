"""Own photographs go from `fedvlm train` to its report."""

import io
import json
from pathlib import Path

import pytest
from matplotlib.cbook import get_sample_data
from own_data import FORMS, make_own_rows, write_pictures
from PIL import Image

from fedvlm_jax.cli.main import main


def cut_photograph(rows: list[dict]) -> list[dict]:
    """The rows with pieces of a photograph that matplotlib carries (Grace Hopper, 1984, public domain), as JPEG."""
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    for number, row in enumerate(rows):
        left, top = 80 * (number % 5), 90 * (number // 5)
        piece = io.BytesIO()
        photograph.crop((left, top, left + 150 + 10 * number, top + 190)).save(piece, "JPEG")
        row |= {"bytes": piece.getvalue(), "file": f"{number:02d}.jpg"}
    return rows


@pytest.mark.broad
@pytest.mark.parametrize(
    "name", ["LLaVA", *(pytest.param(name, marks=pytest.mark.slow) for name in ("metadata.jsonl", "CSV"))]
)
def test_own_data_train_to_a_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "0")  # else the command would start this process again
    rows = cut_photograph(make_own_rows(16))
    write_pictures(tmp_path, rows)
    path = FORMS[name][2](tmp_path, rows)
    out = tmp_path / "run"
    short = "--rounds 1 --batch-size 2 --train.local-steps 1 --rank 2 --no-baseline --evaluation.max-answer-tokens 4"
    main(["train", "--data", str(path), "--model", "florence2-nano", "--out", str(out), *short.split()])
    assert (out / "report.html").is_file()
    stored = json.loads((out / "config.json").read_text())
    assert stored["run"]["data"]["form"] == FORMS[name][0]
    main(["evaluate", str(out)])
    main(["report", str(out)])
