"""Kept against fresh, on numbers that can be worked out by hand, and what is run."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import optimizer_state as experiment

T_975_1 = 12.7062047
KEPT = {0: {"a": 0.4, "b": 0.6}, 1: {"a": 0.5, "b": 0.7}}
FRESH = {0: {"a": 0.5, "b": 0.7}, 1: {"a": 0.7, "b": 0.9}}
LINES = [
    {"method": "plora", "state": state, "seed": seed, "scores": scores}
    for state, by_seed in (("kept", KEPT), ("fresh", FRESH))
    for seed, scores in by_seed.items()
]


def test_a_difference_by_hand():
    """0.1 behind with one seed, 0.2 with the other."""
    (one,) = experiment.summarise(LINES, ["plora"]).values()
    assert one["kept"]["by_seed"] == pytest.approx([0.5, 0.6])
    assert one["fresh"]["mean"] == pytest.approx(0.7)
    assert one["kept_minus_fresh"]["mean"] == pytest.approx(-0.15)
    assert one["kept_minus_fresh"]["high"] == pytest.approx(-0.15 + 0.05 * T_975_1)
    assert one["seeds_in_which_kept_is_ahead"] == 0
    (row,) = experiment.tabulate({"plora": one}).rows
    assert row[:3] == ("plora", "55.0 ± 7.1 %", "70.0 ± 14.1 %")
    assert row[3].startswith("≈ -15.0") or row[3].startswith("≈ −15.0")


def test_test_is_never_read_and_seeds_are_not_the_tuning_s(tmp_path):
    options = experiment.Options(out=tmp_path)
    assert not set(options.seeds) & set(options.study.tune_seeds)
    tuned = json.loads((experiment.RESULTS / "emoji_study.json").read_text())["rates"][experiment.CELL]
    for method, state, seed in experiment.list_missing(options):
        run = experiment.make_run(options, method, state, seed)
        assert (run.evaluation.test, run.train.optimizer_state, run.data.prompt) == (False, state, "client-language")
        assert (run.data.images_per_client, run.evaluation.every) == (20, run.train.rounds)
        rates = (run.train.learning_rate_a, run.train.learning_rate_b)
        assert rates == tuple(tuned.get(method, (5e-3, 2e-3)))


def test_what_has_a_line_is_not_run_again(tmp_path):
    options = experiment.Options(out=tmp_path, methods=("plora",), seeds=(0, 1))
    assert len(list(experiment.list_missing(options))) == 4
    (tmp_path / "lines.jsonl").write_text(json.dumps(LINES[1]) + "\n")
    assert list(experiment.list_missing(options)) == [
        ("plora", "kept", 0),
        ("plora", "fresh", 0),
        ("plora", "fresh", 1),
    ]
