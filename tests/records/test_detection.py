"""Forms are found by content, cheaply, and said where they are not clear."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from own_data import FORMS, make_own_rows, write_pictures

from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.detection import find_form
from fedvlm_jax.records.files import spread_splits


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("nowhere", "parquet"),
        ("./nowhere/at.all", "parquet"),
        ("nowhere/rows.parquet", "parquet"),
        ("rows.tsv", "csv"),
        ("owner/name", "hub"),
        ("HuggingFaceM4/the_cauldron", "hub"),
        ("a/b/c", "parquet"),
        ("~/name", "parquet"),
        ("owner/", "parquet"),
        ("a\0b", "parquet"),
    ],
)
def test_what_does_not_exist_is_known_by_its_name(
    source: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_form(source) == form
    (tmp_path / "owner").mkdir()
    assert find_form("owner/name") == "parquet"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("[", "json"),
        (' \n [{"images": 1}]', "json"),
        ('{"image": "a"}\n{"image": "b"}', "json"),
        ('{"images": [], "prompt": ""}', "json"),
        ('{"images": [], "annotations": []}', "coco"),
        ('{\n"info": {},', "coco"),
        ("", "json"),
        ("hello", "json"),
        ('{"a":' * 100_000, "coco"),
    ],
)
def test_json_is_looked_into(text: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert find_form(str(tmp_path / "a.json")) == find_form(str(tmp_path)) == form


def test_folders_are_looked_through(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.csv").write_text("x")
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "train" / "a.PNG").write_bytes(b"")
    assert find_form(str(tmp_path)) == "imagefolder"
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "llava.json").write_text("[]")
    assert find_form(str(tmp_path)) == "json"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").write_bytes(b"")
    assert find_form(str(tmp_path)) == "parquet"
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match=r"may be csv or json. Forms are .*--data.form NAME says which"):
        find_form(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("")
    assert find_form(str(tmp_path)) == "imagefolder"


def test_splits_are_found_as_datasets_finds_them() -> None:
    assert spread_splits(["train_sft", "dev-2", "testing"]) == ["train", "validation", "test"]
    assert spread_splits(["a/val2014", "a/train2014"]) == ["validation", "train"]
    assert spread_splits(["training", "extra"]) == ["train", "extra"]
    assert spread_splits(["a", "b"]) == spread_splits(["train", "train/2"]) == [None, None]
    assert spread_splits([]) == []


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_own_rows()
    write_pictures(tmp_path, rows)
    FORMS["LLaVA"][2](tmp_path, rows)
    main(["data", "--data", str(tmp_path), "--data.turns", "each", "--out", str(tmp_path / "out")])
    assert "form json: JSON lines or a JSON list" in " ".join(capsys.readouterr().out.split())
    description = json.loads((tmp_path / "out" / "data.json").read_text())
    assert description["form"] == description["options"]["form"] == "json"
    assert [client["name"] for client in description["clients"]] == ["north", "south"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--data", "rows.csv", "--data.turns", "each"],
            "--data.turns belongs to --data.form parquet, --data",
        ),
        (["--data", "rows.csv", "--data.form", "xml"], "--data.form xml: there are parquet, json, csv"),
        (["--data", "emoji", "--data.form", "csv"], "--data.form belongs to one's own data; --data emoji with"),
        (["--data", "rows.csv", "--data.client-folder", "0"], "--data.client-folder is 0"),
        (["--data", "rows.csv", "--data.columns", "image"], "expected OURS=THEIRS"),
        (["--data", "./nowhere/at.all"], "neither a named data set nor a path that exists"),
    ],
)
def test_bad_options_are_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", *words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_form_is_found_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    code = (
        "import sys; from fedvlm_jax.data.sources.registry import make_options\n"
        f"assert make_options({str(tmp_path)!r}).form == 'json'\n"
        "print([m for m in ('jax', 'transformers', 'datasets', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
