"""Cells: what is compared, what is kept, and that a measurement goes on where it was."""

import json

import numpy as np
import pytest
from harness.cells import Cell, append_line, compare_factors, read_lines
from harness.timing import describe_times, interleave, ratio


def test_distances_by_hand():
    start = {"x/a": np.zeros(2), "x/b": np.zeros(1)}
    theirs = {"x/a": np.array([3.0, 0.0]), "x/b": np.array([4.0])}
    ours = {"x/a": np.array([3.0, 0.6]), "x/b": np.array([4.8])}
    found = compare_factors(start, ours, theirs)
    assert found == pytest.approx(
        {"movement": 5.0, "error": 1.0, "error_of_movement": 0.2, "entries": 3, "entries_of_error": 2}
    )


def test_one_entry_that_went_the_other_way_holds_the_distance():
    start, theirs = {"x/a": np.zeros(10_000)}, {"x/a": np.ones(10_000)}
    ours = {"x/a": np.where(np.arange(10_000) == 77, -1.0, 1.0 + 1e-4)}
    found = compare_factors(start, ours, theirs)
    assert found["error_of_movement"] == pytest.approx(0.02, rel=1e-3)
    assert (found["entries"], found["entries_of_error"]) == (10_000, 1)
    assert compare_factors(start, theirs, theirs)["entries_of_error"] == 0


def test_other_factors_are_refused():
    one = {"x/a": np.zeros(2)}
    with pytest.raises(ValueError, match="y/a"):
        compare_factors(one, one, {"y/a": np.zeros(2)})


def test_nothing_moved_is_no_agreement():
    one = {"x/a": np.zeros(2)}
    assert compare_factors(one, one, one)["error_of_movement"] == float("inf")


def test_finished_cells_are_kept_and_the_last_of_each_counts(tmp_path):
    file = tmp_path / "results" / "speed.jsonl"
    assert read_lines(file) == {}
    name = Cell("nano", 2, "both").name
    assert Cell.parse(name) == Cell("nano", 2, "both")
    append_line(file, {"cell": name, "times": 1.0})
    append_line(file, {"cell": "base-1-users", "times": 3.0})
    append_line(file, {"cell": name, "times": 2.0})
    assert {cell: line["times"] for cell, line in read_lines(file).items()} == {"nano-2-both": 2.0, "base-1-users": 3.0}


def test_a_line_that_a_kill_cut_short_is_measured_again(tmp_path):
    file = tmp_path / "speed.jsonl"
    append_line(file, {"cell": "nano-1-both"})
    with file.open("a") as out:
        out.write('{"cell": "nano-2-bo')
    assert list(read_lines(file)) == ["nano-1-both"]
    append_line(file, {"cell": "nano-2-both"})
    assert list(read_lines(file)) == ["nano-1-both", "nano-2-both"]


def test_contestants_take_turns():
    order = []
    clock = {"ours": iter([1.0, 2.0, 3.0]), "theirs": iter([4.0, 4.0, 9.0])}

    def run(name):
        order.append(name)
        return next(clock[name])

    found = interleave({name: lambda name=name: run(name) for name in clock}, 3)
    assert order == ["ours", "theirs"] * 3
    assert found == {"ours": [1.0, 2.0, 3.0], "theirs": [4.0, 4.0, 9.0]}
    assert ratio(found["theirs"], found["ours"]) == 3.0  # of 4, 2 and 3
    assert json.loads(json.dumps(describe_times(found["ours"]))) == {"median": 2.0, "all": [1.0, 2.0, 3.0]}
