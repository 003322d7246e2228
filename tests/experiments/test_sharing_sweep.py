"""The sweep of where sharing wins: what its cells are, what is run in them, and its numbers by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import sharing_summary
import sharing_sweep
from methods_emoji import FRESH_SEEDS, SEARCH_SEEDS, TUNE_SEED

from fedvlm_jax.config.option_checks import validate

SWEEP = sharing_sweep.Sweep(stage="run")
CELL = "5-16-full"


def make_line(method, seed, test, stage="run", cell=CELL, validation=0.5, rates=(5e-3, 2e-3)):
    return {
        "stage": stage, "cell": cell, "method": method, "seed": seed, "rates": list(rates), "validation": validation,
        "test": test, "zero_shot": {"a": 0.1, "b": 0.3}, "seconds": 36.0, "commit": "c",
    }  # fmt: skip


LINES = [
    make_line("local", 0, {"a": 0.4, "b": 0.6}),
    make_line("local", 1, {"a": 0.5, "b": 0.7}),
    make_line("plora", 0, {"a": 0.3, "b": 0.5}),
    make_line("plora", 1, {"a": 0.5, "b": 0.5}),
    make_line("hilora", 0, {"a": 0.6, "b": 0.8}),
    make_line("hilora", 1, {"a": 0.7, "b": 0.9}),
    make_line("local", 0, {"a": 0.4, "b": 0.6}, cell="10-16-none"),  # without plora: no verdict yet
    make_line("apfl", 101, None, "search", validation=0.7, rates=(2e-3, 2e-3)),
    make_line("apfl", 101, None, "search", validation=0.4),
    make_line("apfl", 102, None, "search", validation=0.5, rates=(2e-3, 2e-3)),
    make_line("local", 101, None, "search", validation=0.5),
    make_line("local", 102, None, "search", validation=0.6),
    make_line("feddat", 101, None, "search", validation=0.3),  # has no second seed yet
    make_line("feddat", 101, None, "search", validation=0.4, rates=(2e-3, 2e-3)),
    *(make_line(method, 200, {"a": score}, "confirm") for method, score in (("apfl", 0.6), ("local", 0.5))),
    make_line("plora", 200, {"a": 0.4}, "confirm"),
]


def test_cells_cross_images_and_conflict_and_vary_clients():
    plan = SWEEP.plan()
    assert len(plan) == 4 * 3 + 2 * 3
    for name, cell in plan.items():
        images, clients, conflict = name.split("-")
        data = cell.data
        assert (data.images_per_client, data.partition.clients) == (int(images), int(clients))
        assert len(data.languages) == {"none": 1, "half": 2, "full": 4}[conflict]
        assert (data.vendors, data.prompt) == (("noto", "fluent"), "neutral")
        assert cell.tuned_in == f"10-16-{conflict}"
        assert cell.tuned_in in plan


@pytest.mark.parametrize(("conflict", "share"), [("none", 0), ("half", 1 / 2), ("full", 3 / 4)])
def test_so_many_of_the_others_call_another_answer_right(conflict, share):
    """Shares are of all pairs, a client with itself among them; all are asked the same questions."""
    data = SWEEP.plan()[f"5-16-{conflict}"].data
    table = data.read()
    clients = data.federate(table, 0).clients
    languages = np.array([client.name.split("-")[1] for client in clients])
    assert len(languages) == 16
    assert np.mean(languages[:, None] != languages[None, :]) == pytest.approx(share)
    questions = table.read_text("question")
    assert len({questions[row] for client in clients for row in client.rows_of("train")}) == len(data.tasks)


def test_effort_is_equal_and_test_is_left_alone_before_the_end():
    cell = SWEEP.plan()[CELL]
    for stage in ("tune", "search", "run", "confirm"):
        runs = [SWEEP.make_run(stage, cell, method, 0, (1e-3, 1e-3)) for method in sharing_sweep.METHODS]
        assert {run.evaluation.test for run in runs} == {stage in ("run", "confirm")}
        assert {(r.train.rounds, r.train.local_steps, r.train.batch_size, r.evaluation.every) for r in runs} == {
            (12, 4, 8, 4)
        }
    assert not {TUNE_SEED, *SEARCH_SEEDS} & {*FRESH_SEEDS, *range(SWEEP.seeds)}


@pytest.mark.parametrize("name", sharing_sweep.CANDIDATES)
def test_every_candidate_is_a_run_that_can_start(name):
    validate(SWEEP.make_run("search", SWEEP.plan()[CELL], name, 0, (1e-3, 1e-3)))


def test_differences_and_winners_by_hand():
    found = sharing_summary.summarise(LINES, list(SWEEP.plan()), sharing_sweep.METHODS)
    assert list(found["cells"]) == [CELL]
    cell = found["cells"][CELL]
    assert (cell["images"], cell["clients"], cell["conflict"]) == (5, 16, "full")
    assert cell["methods"]["hilora"]["against"]["local"]["mean"] == pytest.approx(0.2)
    assert cell["methods"]["hilora"]["against"]["plora"]["mean"] == pytest.approx(0.3)
    assert cell["methods"]["zero-shot"]["mean"] == pytest.approx(0.2)
    assert sharing_summary.pick_winner(cell)[0] == "hilora"
    winners, per_conflict = sharing_summary.tabulate("nano", found)[:2]
    assert winners.rows[0][:3] == ("5 images, 16 clients, four languages", "hilora", "75.0 ± 7.1 %")
    assert winners.rows[0][5:] == ("hilora", "2")
    assert [row[0] for row in per_conflict.rows] == ["zero-shot", "local", "plora", "hilora"]


def test_the_search_by_hand():
    search = sharing_summary.summarise_search(LINES)[CELL]
    assert search["validation"] == pytest.approx({"apfl": 0.6, "local": 0.55, "feddat": 0.4})
    assert search["confirmed"]["apfl"]["against"]["plora"]["mean"] == pytest.approx(0.2)


def test_the_report_of_what_there_is(tmp_path, capsys):
    (tmp_path / "runs" / "nano").mkdir(parents=True)
    (tmp_path / "runs" / "nano" / "lines-0-1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES))
    results = tmp_path / "results"
    sharing_summary.write(tmp_path / "runs", results, list(SWEEP.plan()), sharing_sweep.METHODS)
    stored = json.loads((results / "sharing_sweep.json").read_text())
    assert (stored["runs"], stored["hours"]) == (len(LINES), 0.2)
    assert {path.name for path in results.iterdir()} == {
        "sharing_sweep.json", "sharing_sweep.md", "sharing_sweep_nano.png", "sharing_regions.png",
    }  # fmt: skip
    assert "hilora" in capsys.readouterr().out


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nothing has been measured"):
        sharing_summary.write(tmp_path, tmp_path / "results", list(SWEEP.plan()), sharing_sweep.METHODS)
