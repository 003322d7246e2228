"""The comparison of two bases on figures that can be read by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import methods_summary
import two_bases
from test_methods_emoji import LINES, line

OTHER = [
    line("run", "plora", 0, {"a": 0.5, "b": 0.7}),
    line("run", "plora", 1, {"a": 0.5, "b": 0.7}),
    line("run", "local", 0, {"a": 0.4, "b": 0.6}),
    line("run", "local", 1, {"a": 0.4, "b": 0.6}),
    line("run", "fedavg-lora", 0, {"a": 0.4, "b": 0.6}),
    line("run", "ditto", 0, {"a": 0.4, "b": 0.6}),
]


@pytest.fixture
def studies():
    first = [*LINES, line("run", "fedavg-lora", 0, {"a": 0.4, "b": 0.6})]
    return [{"lang-20": methods_summary.summarise_cell("lang-20", lines)} for lines in (first, OTHER)]


def test_methods_that_both_studies_have_stand_by_the_second_s_mean(studies):
    started = {"methods": {"local": {}}}
    paired = two_bases.pair_cells(studies[0] | {"lang-60": started}, studies[1] | {"lang-60": started})
    assert list(paired) == ["lang-20"], "the other cell has local alone"
    assert list(paired["lang-20"]) == ["plora", "local", "fedavg-lora", "zero-shot"]


def test_a_verdict_that_differs_is_named(studies):
    """pLoRA is 0.15 ± 0.64 ahead of local on the first base, whose interval holds zero, and 0.1 ± 0 on the second."""
    table = two_bases.tabulate("lang-20", two_bases.pair_cells(*studies)["lang-20"], ("one", "two"))
    plora, local, *_ = table.rows
    assert (plora[0], plora[1], plora[4]) == ("plora", "70.0 ± 14.1 %", "60.0 ± 0.0 %")
    assert (plora[2][0], plora[5][0], plora[-1]) == ("≈", "▲", "vs local")
    assert local[-1] == "none"


def test_tables_and_picture_are_written(studies, tmp_path, capsys):
    for name, cells in zip(("one.json", "two.json"), studies, strict=True):
        (tmp_path / name).write_text(json.dumps({"cells": cells}))
    two_bases.main(two_bases.TwoBases(tmp_path / "one.json", tmp_path / "two.json", results=tmp_path))
    assert "| plora | 70.0" in (tmp_path / "two_bases.md").read_text()
    assert (tmp_path / "two_bases.png").stat().st_size > 5_000
    assert "SmolVLM-nano" in capsys.readouterr().out
