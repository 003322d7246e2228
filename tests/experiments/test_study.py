"""The study's aggregation on numbers that can be computed by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
from made_up import write_comparison

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import study_emoji
import study_summary

from fedvlm_jax.run_dir.reader import read_comparison

T_975_1 = 12.7062047  # Student's t, 97.5 %, one degree of freedom: two seeds
LOCAL = {0: {"a": 0.4, "b": 0.6}, 1: {"a": 0.5, "b": 0.7}}
PLORA = {0: {"a": 0.5, "b": 0.7}, 1: {"a": 0.7, "b": 0.9}}
FEDAVG = {0: {"a": 0.1, "b": 0.1}, 1: {"a": 0.2, "b": 0.2}}
TUNED = {0: {"a": 0.4, "b": 0.6}, 1: {"a": 0.6, "b": 0.8}}
ZERO = {0: {"a": 0.0, "b": 0.1}, 1: {"a": 0.0, "b": 0.1}}
SCORES = {"local": LOCAL, "fedavg-lora": FEDAVG, "fedavg-lora+ft": TUNED, "plora": PLORA}


def write_cell(folder, prompt="neutral", images=20):
    write_comparison(folder, SCORES, ZERO)
    path = folder / "comparison.json"
    stored = json.loads(path.read_text())
    stored["settings"]["data"] = {"prompt": prompt, "images_per_client": images}
    stored |= {"versions": {"jax": "0.10.2"}, "commit": "abc1234"}
    path.write_text(json.dumps(stored))
    return read_comparison(folder)


def test_a_cell_by_hand(tmp_path):
    cell = study_summary.summarise_cell(write_cell(tmp_path / "cell"))
    assert (cell["prompt"], cell["images_per_client"], cell["seeds"]) == ("neutral", 20, [0, 1])
    assert list(cell["methods"]) == ["zero-shot", *SCORES]
    plora = cell["methods"]["plora"]
    assert plora["by_seed"] == pytest.approx([0.6, 0.8])
    assert plora["mean"] == pytest.approx(0.7)
    assert plora["std_over_seeds"] == pytest.approx(math.sqrt(0.02))
    assert plora["worst_decile"] == pytest.approx((0.5 + 0.7) / 2), "of two clients the worst decile is the lower one"
    assert plora["by_client"] == pytest.approx({"a": 0.6, "b": 0.8})
    assert plora["high"] - plora["mean"] == pytest.approx(0.1 * T_975_1), "standard error: 0.1414 / sqrt(2)"
    assert plora["bytes_up_per_client"] == 180_000
    assert cell["methods"]["local"]["bytes_up_per_client"] == 0
    assert cell["methods"]["zero-shot"]["bytes_up_per_client"] is None


def test_paired_differences_by_hand(tmp_path):
    cell = study_summary.summarise_cell(write_cell(tmp_path / "cell"))
    against = cell["methods"]["plora"]["against"]
    assert list(against) == ["local", "fedavg-lora", "fedavg-lora+ft"]
    assert against["local"]["mean"] == pytest.approx(0.15), "0.1 with one seed, 0.2 with the other"
    assert against["local"]["low"] == pytest.approx(0.15 - 0.05 * T_975_1)
    assert against["fedavg-lora"]["mean"] == pytest.approx(0.55)
    assert against["fedavg-lora+ft"]["mean"] == pytest.approx(0.1)
    assert list(cell["methods"]["fedavg-lora"]["against"]) == ["local", "fedavg-lora+ft"], "no method against itself"


def make_points(scores, method="plora", seed=100):
    return [
        {"method": method, "seed": seed, "learning_rate_a": a, "learning_rate_b": b, "score": score}
        for (a, b), score in scores.items()
    ]


def test_the_best_rates_on_validation():
    one, two = (1e-3, 1e-3), (5e-3, 2e-3)
    points = [
        *make_points({one: 0.3, two: 0.2}),
        *make_points({one: 0.1, two: 0.4}, seed=101),
        *make_points({one: 0.5, two: 0.5}, "local"),
        *make_points({one: 0.5, two: 0.5}, "local", seed=101),
    ]
    assert study_summary.choose_rates(points, (one, two)) == {"plora": two, "local": one}, "mean over seeds; first wins"


def test_unequal_effort_is_refused():
    one, two = (1e-3, 1e-3), (5e-3, 2e-3)
    points = [*make_points({one: 0.3, two: 0.2}), *make_points({one: 0.9}, seed=101)]
    with pytest.raises(ValueError, match="plora was not tried with equal effort"):
        study_summary.choose_rates(points, (one, two))


def test_points_that_are_there_are_not_tried_again(tmp_path):
    study = study_emoji.Study(out=tmp_path, grid=((1e-3, 1e-3), (5e-3, 2e-3)), tune_per="cell")
    everything = list(study_emoji.missing_points(study))
    assert len(everything) == 4 * 2 * 4, "cells x grid x methods"
    cell, seed, pair, method = everything[0]
    line = {"cell": cell, "seed": seed, "learning_rate_a": pair[0], "learning_rate_b": pair[1], "method": method}
    (tmp_path / "tuning.jsonl").write_text(json.dumps(line) + '\n{"cell": "neut')
    assert list(study_emoji.missing_points(study)) == everything[1:]
    with pytest.raises(SystemExit, match="the tuning is not finished"):
        study_emoji.choose(study)


def test_per_prompt_the_most_images_are_tuned(tmp_path):
    study = study_emoji.Study(out=tmp_path, tune_per="prompt")
    assert {cell for cell, *_ in study_emoji.missing_points(study)} == {"neutral-60", "client-language-60"}
    assert study.tuned_in("neutral-20") == "neutral-60"


def test_tuning_seeds_are_not_the_study_s():
    with pytest.raises(SystemExit, match="among the study's own"):
        study_emoji.Study(tune_seeds=(3,))


def test_tuning_leaves_test_alone(tmp_path):
    study = study_emoji.Study(out=tmp_path)
    assert not study.base("neutral-20", 100, tmp_path, test=False).evaluation.test
    assert study.base("neutral-20", 0, tmp_path, test=True).evaluation.test


def test_the_command_has_no_folders():
    words = ["all", "--out", "/tmp/here", "--seeds", "3", "--results=/tmp/there"]
    assert study_emoji.without_places(words) == ["--seeds", "3"]


def test_the_report_of_made_up_comparisons(tmp_path, capsys):
    study = study_emoji.Study(out=tmp_path, results=tmp_path / "results", grid=((1e-3, 1e-3),))
    for cell, data in study.cells.items():
        write_cell(tmp_path / cell, data.prompt, data.images_per_client)
    lines = [
        {"cell": cell, "seed": seed, "learning_rate_a": a, "learning_rate_b": b, "method": method, "score": 0.5}
        for cell, seed, (a, b), method in study_emoji.missing_points(study)
    ]
    (tmp_path / "tuning.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    study_emoji.report(study, ["--seeds", "2"])
    text = (tmp_path / "results" / "emoji_study.md").read_text()
    assert text in capsys.readouterr().out
    assert "**Neutral question, 60 images per client**" in text
    assert "| **plora** | **70.0 ± 14.1 %** | **60.0 %** | **≈ +15.0 [−48.5, +78.5]** |" in text
    assert "`python experiments/study_emoji.py --seeds 2`" in text
    stored = json.loads((tmp_path / "results" / "emoji_study.json").read_text())
    assert stored["tuning"] == lines
    assert stored["rates"]["neutral-20"]["plora"] == [1e-3, 1e-3]
    assert str(tmp_path) not in json.dumps(stored)
    assert (tmp_path / "results" / "emoji_study.png").read_bytes().startswith(b"\x89PNG")
