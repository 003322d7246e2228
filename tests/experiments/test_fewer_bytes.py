"""The study of accuracy against bytes: what is run, what is run again, and its numbers by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import fewer_bytes as experiment

from fedvlm_jax.config.option_checks import validate

ARMS = {("local", "float32"): 0, ("plora", "float32"): 4096, ("plora", "int8"): 1056}


def make_line(method, way, seed, test, stage="run", validation=0.5, rates=(5e-3, 2e-3)):
    return {
        "stage": stage, "method": method, "way": way, "seed": seed, "rates": list(rates), "validation": validation,
        "test": test, "zero_shot": {"a": 0.1, "b": 0.3} if test else None, "bytes_up": 12 * ARMS[method, way],
        "rounds": 12, "compression_error": 0.01 if way == "int8" else None, "seconds": 2.0, "commit": "c",
    }  # fmt: skip


LINES = [
    make_line("local", "float32", 0, {"a": 0.4, "b": 0.6}),
    make_line("local", "float32", 1, {"a": 0.5, "b": 0.7}),
    make_line("plora", "float32", 0, {"a": 0.5, "b": 0.7}),
    make_line("plora", "float32", 1, {"a": 0.7, "b": 0.9}),
    make_line("plora", "int8", 0, {"a": 0.5, "b": 0.6}),
    make_line("plora", "int8", 1, {"a": 0.7, "b": 0.8}),
]


def test_differences_and_bytes_by_hand():
    local, whole, int8 = experiment.summarise(LINES)
    assert (local["method"], whole["way"], int8["way"]) == ("local", "float32", "int8")
    assert [one["mean"] for one in (local, whole, int8)] == pytest.approx([0.55, 0.7, 0.65])
    assert whole["against"].keys() == {"local", "zero-shot"}
    assert int8["against"]["whole"]["mean"] == pytest.approx(-0.05)
    assert int8["against"]["local"]["mean"] == pytest.approx(0.1)
    assert whole["against"]["zero-shot"]["mean"] == pytest.approx(0.5)
    rows = experiment.tabulate([local, whole, int8]).rows
    assert rows[0][:5] == ("local", "nothing", "0 B", "0 B", "–")
    assert rows[2][:5] == ("plora", "int8", "1.0 KiB", "12.4 KiB", "1 %")
    assert rows[2][6].startswith("▼") or rows[2][6].startswith("≈")


def test_the_picture_has_every_arm():
    figure = experiment.draw(experiment.summarise(LINES))
    (ax,) = figure.axes
    texts = {text.get_text() for text in ax.texts}
    assert {"local, which sends nothing", "plora, float32", "int8"} <= texts
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() not in ("None", "|", "_")] == [
        [12 * 1056, 12 * 4096]
    ]


def test_test_is_read_once_and_every_run_is_one_that_can_be(tmp_path):
    options = experiment.Options(out=tmp_path)
    assert experiment.TUNE_SEED not in range(options.seeds)
    arms = list(experiment.list_arms())
    assert len(arms) == len(set(arms)) == 1 + 3 * 4
    for method, way in arms:
        tuning, run = (
            experiment.make_run(options, method, way, 0, options.grid[0], test=test) for test in (False, True)
        )
        assert (tuning.evaluation.test, run.evaluation.test) == (False, True)
        assert tuning.messages == run.messages == experiment.WAYS[way]
        assert (run.train.rounds, run.evaluation.every, run.data.images_per_client) == (12, 12, 20)
        validate(run)


def test_what_has_a_line_is_not_run_again(tmp_path):
    line = make_line("plora", "int8", 3, {"a": 0.5})
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    bench = experiment.Bench(experiment.Options(out=tmp_path))
    assert bench.score("run", "plora", "int8", 3, (5e-3, 2e-3)) == line
    assert bench.model is None
