"""The study of thousands of private clients: its runs can work, and its numbers by hand."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import private_population as experiment

from fedvlm_jax.config.option_checks import validate


def make_line(method, epsilon, seed, scores, noise=None):
    return {
        "method": method, "epsilon": epsilon, "seed": seed, "scores": scores, "zero_shot": {"a": 0.25, "b": 0.35},
        "spent": epsilon or None, "noise": noise, "clip": noise, "noise_to_update": noise, "bytes_up": 2048,
        "shared_norm": None if method == "local" else 2.0 + (noise or 0.0),
    }  # fmt: skip


LINES = [
    make_line("plora", 0.0, 0, {"a": 0.4, "b": 0.6}),
    make_line("plora", 0.0, 1, {"a": 0.6, "b": 0.8}),
    make_line("plora", 8.0, 0, {"a": 0.3, "b": 0.5}, noise=1.5),
    make_line("local", 0.0, 0, {"a": 0.4, "b": 0.5}),
]


def test_cells_by_hand():
    found = experiment.summarise(LINES)
    assert found["plora"]["0"]["mean"] == pytest.approx(0.6)
    assert found["plora"]["0"]["by_seed"] == pytest.approx([0.5, 0.7])
    assert found["plora"]["8"]["zero_shot"] == pytest.approx(0.3)
    rows = experiment.tabulate(found, (0.0, 8.0, 1.0)).rows
    assert rows == (
        ("plora", "60.0 ± 14.1 %", "40.0 % (noise 1.5)", "–", "2"), ("local", "45.0 %", "–", "–", "2")
    )  # fmt: skip


def test_norms_have_the_methods_that_share():
    table = experiment.tabulate_norms(experiment.summarise(LINES), (0.0, 8.0, 1.0))
    assert table.rows == (("plora", "2.00", "3.50", "–"),)


def test_the_picture_has_every_method_and_both_lines():
    (ax,) = experiment.draw(experiment.summarise(LINES), (0.0, 8.0, 1.0)).axes
    assert {line.get_label() for line in ax.get_lines()} >= {"zero-shot", "training alone"}
    assert [text.get_text() for text in ax.get_xticklabels()] == ["no noise", "8", "1"]


def test_runs_at_other_rates_and_clips_are_others(tmp_path):
    options = experiment.Options(out=tmp_path)
    line = make_line("plora", 8.0, 0, {"a": 0.5}) | {"rates": [5e-3, 2e-3], "first_clip": 1.0}
    other = line | {"first_clip": 3.0}
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (line, other)))
    assert experiment.read_lines(options) == [line]
    tighter = dataclasses.replace(options, clip=3.0)
    assert experiment.read_lines(tighter) == [other]
    folders = {experiment.make_run(one, "plora", 8.0, 0).out for one in (options, tighter)}
    assert len(folders) == 2
    assert ("plora", 8.0, 0) in experiment.list_missing(dataclasses.replace(options, scale=2.0))


def test_every_run_can_work(tmp_path):
    options = experiment.Options(out=tmp_path)
    missing = list(experiment.list_missing(options))
    assert len(missing) == (len(options.methods) - 1) * len(options.epsilons) + 1
    for method, epsilon, seed in missing:
        run = experiment.make_run(options, method, epsilon, seed)
        validate(run)
        assert run.privacy.on == bool(epsilon)
