"""The plan of the study of all methods, and its summary of lines that can be added up by hand."""

import json
import sys
from pathlib import Path

import pytest
from toy import WRITING

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import methods_emoji
import methods_summary

from fedvlm_jax.config.option_checks import plain, validate

T_975_1 = 12.7062047  # Student's t, 97.5 %, one degree of freedom: two seeds
STUDY = methods_emoji.Study(stage="run")


def line(stage, method, seed, test=None, cell="lang-20", **more):
    usual = {
        "rates": [0.01, 0.005], "validation": 0.5, "test": test, "zero_shot": {"a": 0.1, "b": 0.3}, "bytes_up": 1024,
        "bytes_down": 2048, "health": {}, "neighbours": None, "seconds": 36.0, "commit": "abc", "curve": [],
    }  # fmt: skip
    return {"stage": stage, "cell": cell, "method": method, "seed": seed} | usual | more


LINES = [
    line("run", "local", 0, {"a": 0.4, "b": 0.6}, bytes_up=0),
    line("run", "local", 1, {"a": 0.5, "b": 0.7}, bytes_up=0),
    line("run", "plora", 0, {"a": 0.5, "b": 0.7}),
    line("run", "plora", 1, {"a": 0.7, "b": 0.9}),
    line("curve", "local", 100, curve=[[2, 0.3], [4, 0.6]], bytes_up=0),
    line("curve", "plora", 100, curve=[[2, 0.39], [4, 0.41]]),
    line("curve", "fedavg-lora", 100, curve=[[2, 0.2], [4, 0.3]]),
    line("search", "B of attention", 101, validation=0.4),
    line("search", "B of attention", 102, validation=0.6),
    line("search", "local", 101, validation=0.45),
    line("confirm", "B of attention", 200, {"a": 0.6, "b": 0.6}),
    line("confirm", "local", 200, {"a": 0.5, "b": 0.5}),
]


def test_a_cell_by_hand():
    cell = methods_summary.summarise_cell("lang-20", LINES)["methods"]
    assert list(cell) == ["plora", "local", "zero-shot"], "the best first"
    plora = cell["plora"]
    assert plora["mean"] == pytest.approx(0.7)
    assert plora["against"]["local"]["mean"] == pytest.approx(0.15)
    assert plora["against"]["local"]["low"] == pytest.approx(0.15 - 0.05 * T_975_1)
    assert cell["zero-shot"]["mean"] == pytest.approx(0.2)
    assert cell["zero-shot"]["bytes_up"] is None


def test_bytes_to_a_level_by_hand():
    """Zero-shot 0.2 and local's end 0.6: the level is 0.4, which plora reaches with the fourth round."""
    cell = methods_summary.summarise_cell("lang-20", [*LINES, line("run", "fedavg-lora", 0, {"a": 0.2, "b": 0.2})])
    assert cell["methods"]["plora"]["bytes_to_level"] == 4 * 1024
    assert cell["methods"]["fedavg-lora"]["bytes_to_level"] == "never"


def test_the_search_by_hand():
    search = methods_summary.summarise_search(LINES)
    assert search["validation"] == pytest.approx({"B of attention": 0.5, "local": 0.45})
    assert search["confirmed"]["B of attention"]["against"]["local"]["mean"] == pytest.approx(0.1)


def test_the_report_of_what_there_is(tmp_path, capsys):
    (tmp_path / "lines-0-2.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES[:7]))
    (tmp_path / "lines-1-2.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES[7:]) + '{"cut sho')
    methods_summary.write(tmp_path, tmp_path / "results", STUDY.plan(), "florence2-nano")
    stored = json.loads((tmp_path / "results" / "methods_emoji.json").read_text())
    assert (stored["runs"], list(stored["cells"])) == (len(LINES), ["lang-20"])
    text = capsys.readouterr().out
    assert "4.0 KiB" in text
    assert "▲" in text or "≈" in text


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nothing has been measured"):
        methods_summary.write(tmp_path, tmp_path / "results", STUDY.plan(), "florence2-nano")


def test_every_method_is_in_every_cell_of_the_grid():
    plan = STUDY.plan()
    for name in ("lang-20", "lang-60", "neutral-20", "neutral-60", "iid-20", "iid-60"):
        assert {plain(method) for method in plan[name].methods} == set(WRITING)
    for cell in plan.values():
        assert plan[cell.tuned_in].data.prompt == cell.data.prompt
    for name, clients in (("style", (4, 1)), ("language", (1, 4)), ("both", (2, 2))):
        assert (len(plan[name].data.vendors), len(plan[name].data.languages)) == clients


def test_parts_share_the_methods_out():
    names = STUDY.plan()["lang-20"].methods
    parts = [methods_emoji.Study(stage="run", part=f"{i}/3").mine(names) for i in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(names)


def test_effort_is_equal_and_test_is_left_alone_before_the_end():
    plan = STUDY.plan()
    for stage in ("tune", "search", "curve", "run", "confirm"):
        runs = [
            STUDY.make_run(stage, plan["lang-20"], method, 0, (1e-3, 1e-3)) for method in ("local", "fedavg-lora+knn")
        ]
        assert {run.evaluation.test for run in runs} == {stage in ("run", "confirm")}
        assert len({(run.train.rounds, run.train.local_steps, run.train.batch_size) for run in runs}) == 1
    seeds = {methods_emoji.TUNE_SEED, *methods_emoji.SEARCH_SEEDS}
    assert not seeds & set(methods_emoji.FRESH_SEEDS)
    assert not seeds & set(range(STUDY.seeds))


@pytest.mark.parametrize("name", [*methods_emoji.PATTERNS, *methods_emoji.TWO_ADAPTERS])
def test_every_candidate_is_a_run_that_can_start(name):
    run = STUDY.make_run("search", STUDY.plan()["lang-20"], name, 0, (1e-3, 1e-3))
    validate(run)
    assert (run.method == "share") == (name in methods_emoji.PATTERNS)
