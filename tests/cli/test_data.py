"""`fedvlm data`: quick help, files where they are asked for, a leak that is loud, and --strict."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_parquet import make_row, write_rows

from fedvlm_jax.cli.main import main


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Row 5 (b, test) shows what row 0 (a, train) shows."""
    splits = ("train", "train", "train", "test", "test", "test")
    made = [make_row(n, n % 5, client="ab"[n % 2], split=split) for n, split in enumerate(splits)]
    return write_rows(tmp_path / "rows.parquet", made)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom fedvlm_jax.cli.main import main\n"
        "try:\n    main(['data', '--help'])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = ('jax', 'flax', 'transformers', 'datasets', 'matplotlib', 'pyarrow', 'scipy')\n"
        "print('HEAVY', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--check-images" in done.stdout
    assert "--data.partition" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_a_leak_is_loud_and_fails_only_when_strict(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "--data", str(rows), "--out", str(tmp_path / "out")]
    main(words)
    shown = " ".join(capsys.readouterr().out.split())
    assert "LEAK: 1 image is in train and in test" in shown
    assert "data.png" in shown
    assert json.loads((tmp_path / "out" / "data.json").read_text())["rows"]["in_use"] == 6
    assert (tmp_path / "out" / "data.png").is_file()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--strict"])
    assert stop.value.code == 1
    assert "--strict" in capsys.readouterr().err


def test_tokens_of_a_model_are_counted(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "--data", str(rows), "--model", "florence2-nano", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "Tokens of florence2-nano" in shown
    found = json.loads((tmp_path / "out" / "data.json").read_text())["tokens"]
    assert found["image_tokens"] == 17
    assert found["prompt"]["median"] > found["image_tokens"]
    assert found["left_out"] == {}
    words = ["data", "--data", str(rows), "--model", "florence2-nano", "--data.max-prompt-tokens", "18"]
    main([*words, "--out", str(tmp_path / "short")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Left out: 6 × prompt too long." in shown
    assert "6 of 6 rows cannot be used, more than --data.max-bad-share" in shown


def test_a_model_s_tokens_are_those_of_sound_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_row(6)["image"]["bytes"][:40]
    made = [*map(make_row, range(6)), make_row(6, image={"bytes": broken, "path": "6.png"}), make_row(7, chosen=" ")]
    words = ["data", "--data", str(write_rows(tmp_path / "rows.parquet", made)), "--out", str(tmp_path / "out")]
    main(words)
    shown = " ".join(capsys.readouterr().out.split())
    assert "which --model counts, and broken images, which --check-images looks for" in shown
    assert "pictures were not decoded: --check-images does that, and finds broken ones" in shown
    main([*words, "--model", "florence2-nano"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 × broken or truncated image" in shown
    assert "pictures were decoded to find broken ones, and not compared: --check-images does that" in shown
    assert "looks for" not in shown


def test_options_are_those_of_train(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.partition", "iid", "--data.clients", "2", "--seed", "4", "--check-images", "--strict"]
    source = ["--data", str(rows), "--data.max-bad-share", "0.5"]
    out = tmp_path / "out"
    with pytest.raises(SystemExit):  # the file's own split column still puts the picture into both
        main(["data", *source, *flags, "--out", str(out)])
    stored = json.loads((out / "data.json").read_text())
    assert stored["options"]["partition"] == {"kind": "iid", "clients": 2}
    assert stored["seed"] == 4
    assert stored["images"]["decoded"]
    assert [one["name"] for one in stored["clients"]] == ["client-0", "client-1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "nowhere"], "neither a named data set nor a path"),
        (["--seed", "-1"], "--seed is -1"),
        (["--data.alpha", "0"], "--data.alpha is 0.0"),
        (["--model", "nothere"], "no model 'nothere'"),
        (["--image-size", "64"], "--image-size, --image-tiles and --image-pixels are for --model"),
        (["--image-pixels", "4096", "--model", "florence2-nano"], "leave --image-pixels out"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", *words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
