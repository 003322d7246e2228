"""`fedvlm data` from options to files: its numbers in tables and pictures, its warnings, and that a leak is loud."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_parquet import make_row, write_rows
from rlaif_form import Form, write_folder

from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting import data_report
from fedvlm_jax.reporting.figures.data_figures import draw_data
from fedvlm_jax.reporting.tables import Table


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


def make_leak(path: Path) -> Path:
    """Two clients, eight rows; row 5 (b, test) shows what row 0 (a, train) shows."""
    splits = ("train", "train", "train", "validation", "test", "test", "train", "train")
    rows = [make_row(n, n if n != 5 else 0, client="ab"[n % 2], split=split) for n, split in enumerate(splits)]
    return write_rows(path / "a.parquet", rows)


def find_table(tables: list[Table], title: str) -> Table:
    return next(table for table in tables if title in table.title)


def test_files_tables_and_warnings(tmp_path: Path) -> None:
    options = make_options(source=str(make_leak(tmp_path)))
    notes: list[str] = []
    found = data_report.describe_data(options, 3, tmp_path / "out", note=notes.append)
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "data.png").read_bytes().startswith(b"\x89PNG")
    assert (found["seed"], found["options"]["source"]) == (3, options.source)
    assert len(notes) == 3
    tables = data_report.tabulate_data(found)
    clients = find_table(tables, "seed 3: 2 clients")
    assert clients.rows == (("a", "3", "0", "1", "4"), ("b", "2", "1", "1", "4"), ("all", "5", "1", "2", "7"))
    assert find_table(tables, "two places").rows[1][:3] == ("train and test", "1", "1")
    (leak,) = data_report.find_leaks(found)
    assert leak == (
        "LEAK: 1 image is in train and in test, on 1 row of test (0 of them the same client's). "
        "Row 5, for example, shows what row 0 shows."
    )
    assert data_report.word_findings(found) == [
        "1 image is with two or more clients, on 2 rows; a and b have most in common (1)."
    ]


def test_all_is_well_is_silent(tmp_path: Path) -> None:
    rows = [make_row(n, client="ab"[n % 2], split=("train", "test")[n // 2 % 2]) for n in range(8)]
    found = data_report.describe_data(make_options(source=str(write_rows(tmp_path / "a.parquet", rows))), 0, tmp_path)
    assert data_report.find_leaks(found) == []
    assert data_report.word_findings(found) == []


def test_what_a_run_would_stumble_over_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "rows", Form(rows=60, spoil={"empty answer": 2}))
    found = data_report.describe_data(make_options(source=str(tmp_path / "rows")), 0, tmp_path)
    first, second = data_report.word_findings(found)
    assert first.startswith("2 of 60 rows cannot be used, more than --data.max-bad-share 0.01")
    assert second.startswith("2 clients have nothing to be tested on: made-up-attic, made-up-garden.")
    left_out = find_table(data_report.tabulate_data(found), "left out")
    assert left_out.rows == (("empty answer", "2"),)
    assert "--check-images" in left_out.note


def test_bad_data_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a named data set nor a path"):
        data_report.describe_data(make_options(source="nowhere"), 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_description(count: int, values: int, held_out: int = 0, largest: int = 90) -> dict[str, Any]:
    """Clients of falling size, each with most of one value."""
    clients, by_client = [], {}
    for number in range(count):
        size = max(1, largest * (count - number) // count)
        held = number >= count - held_out
        name = f"client-{number}"
        parts = {"train": 0 if held else size, "validation": 0, "test": size if held else 0}
        clients.append({"name": name, "held_out": held, **parts, "images": size})
        by_client[name] = {f"v{number % values}": size}
    totals = {f"v{value}": 1 for value in range(values)}
    return {"clients": clients, "label": "key", "keys": {"key": {"values": totals, "by_client": by_client}}}


def test_few_clients_stand_with_their_names_and_numbers() -> None:
    left, right = draw_data(make_description(4, 2, held_out=1)).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["client-0", "client-1", "client-2", "client-3 (held out)"]
    assert [text.get_text() for text in left.texts] == ["90", "67", "45", "22"]
    train = left.containers[0]
    assert [bar.get_width() for bar in train] == [90, 67, 45, 0]
    assert [bar.get_width() for bar in right.containers[0]] == [100, 0, 100, 0]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["v0", "v1"]


@pytest.mark.broad
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_clients_stay_a_picture_of_one_page(count: int) -> None:
    figure = draw_data(make_description(count, 12, held_out=count // 10))
    assert max(figure.get_size_inches()) < 10
    top, bottom = figure.axes
    assert [label.get_text() for label in bottom.get_xticklabels()] == []
    assert f"{count} clients, on the right the {count // 10} that are held out" in bottom.get_xlabel()
    assert top.get_yscale() == "linear"
    shown = [text.get_text() for text in bottom.get_legend().get_texts()]
    assert shown == [*(f"v{value}" for value in range(7)), "5 others"]
    # Every client's shares fill its column, and clients with most of the same value stand together.
    heights = np.stack([[bar.get_height() for bar in container] for container in bottom.containers])
    assert heights.sum(axis=0) == pytest.approx(100)
    main = heights.argmax(axis=0)[: count - count // 10]
    assert (np.diff(main) >= 0).all()


def test_very_unequal_clients_are_drawn_on_a_log_scale() -> None:
    description = make_description(60, 3)
    description["clients"][0]["train"] = 100_000
    top = draw_data(description).axes[0]
    assert top.get_yscale() == "log"
    assert "log scale" in top.get_legend().get_title().get_text()


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    description = make_description(2, 2)
    description["clients"][0]["name"] = "$x$ " + "long " * 20
    description["clients"][1]["name"] = "_hidden"
    description["keys"]["key"] = {
        "values": {"_first": 4, "$a_b$": 5},
        "by_client": {description["clients"][0]["name"]: {"_first": 4}, "_hidden": {"$a_b$": 5}},
    }
    figure = draw_data(description)
    left, right = figure.axes
    assert left.get_yticklabels()[0].get_text().startswith("$x$ long")
    assert len(left.get_yticklabels()[0].get_text()) <= 34
    assert [text.get_text().strip() for text in right.get_legend().get_texts()] == ["_first", "$a_b$"]
    figure.savefig(tmp_path / "p.png")


def test_without_a_label_rows_stand_alone() -> None:
    description = make_description(5, 1) | {"label": None}
    assert len(draw_data(description).axes) == 1
