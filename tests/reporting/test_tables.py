"""Tables: their numbers worked out by hand, and the folders they are read from."""

import io
import json
from pathlib import Path

import pytest
from made_up import CLIENTS, write_comparison, write_run
from rich.console import Console

from fedvlm_jax.config.benchmark import find_benchmark
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.over_seeds import Estimate
from fedvlm_jax.reporting.benchmark_tables import tabulate_verdicts
from fedvlm_jax.reporting.figures import run_figures
from fedvlm_jax.reporting.pages import render
from fedvlm_jax.reporting.score_tables import tabulate_comparison, tabulate_run, tabulate_runs
from fedvlm_jax.reporting.sentences import describe_run
from fedvlm_jax.reporting.tables import (
    Table,
    cut_to_width,
    format_bytes,
    show,
    to_markdown,
    to_rich,
)
from fedvlm_jax.run_dir.reader import read_comparison, read_metrics, read_run
from fedvlm_jax.training.benchmarks.check import Verdict

# Two seeds, two clients. Means per seed: local .5, .6; plora .6, .8. Differences by seed: .1 and .2, mean .15;
# standard error .05; Student's t with one degree of freedom at 97.5 % is 12.7062, so ± .6353.
LOCAL = {0: {"a": 0.4, "b": 0.6}, 1: {"a": 0.5, "b": 0.7}}
PLORA = {0: {"a": 0.5, "b": 0.7}, 1: {"a": 0.7, "b": 0.9}}
ZERO = {0: {"a": 0.1, "b": 0.1}, 1: {"a": 0.1, "b": 0.1}}


def test_comparison_by_hand(tmp_path: Path) -> None:
    record = read_comparison(write_comparison(tmp_path / "c", {"local": LOCAL, "plora": PLORA}, ZERO))
    (table,) = tabulate_comparison(record)
    assert table.columns == ("method", "mean", "worst decile", "against local", "upload per client, round")
    assert table.rows[1] == ("local", "55.0 ± 7.1 %", "45.0 %", "–", "0 B")
    # Worst tenth of two clients is the worse one: (.5 + .7) / 2. Sample deviation of .6 and .8: .1414.
    assert table.rows[2] == ("plora", "70.0 ± 14.1 %", "60.0 %", "≈ +15.0 [−48.5, +78.5]", "176 KiB")
    assert table.rows[0][:3] == ("zero-shot", "10.0 ± 0.0 %", "10.0 %")
    assert table.strong == {2}
    assert "t-interval over seeds" in table.note


def test_a_run_by_hand(tmp_path: Path) -> None:
    # Four clients: .2 .4 .4 .6 has mean .4 and population deviation sqrt(.02) = .1414.
    personal = {"a": 0.2, "b": 0.4, "c": 0.4, "d": 0.6}
    record = read_run(write_run(tmp_path / "r", dict.fromkeys("abcd", 0.1), personal))
    models, metrics, clients = tabulate_run(record)
    # Jain: 1.6² / (4 · (.04 + .16 + .16 + .36)) = 2.56 / 2.88.
    assert models.rows[1][:6] == ("personal (plora)", "40.0 %", "14.1 %", "20.0 %", "20.0 %", "0.889")
    assert models.rows[1][6].startswith("+30.0 [")
    assert models.rows[0][6] == "–"
    assert metrics.columns == ("metric", "zero-shot", "personal (plora)")
    assert metrics.rows == (("token accuracy", "50.0 %", "50.0 %"), ("loss", "0.500", "0.500"))
    assert clients.rows[0] == ("d", "10.0 %", "60.0 %")
    assert clients.rows[-1] == ("a", "10.0 %", "20.0 %")


def test_a_run_judged_by_preferences_with_newcomers_and_a_matrix(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1, "b": 0.1}, {"a": 0.5, "b": 0.1})
    results = json.loads((folder / "results.json").read_text())
    for model, values in (("zero_shot", (0.5, 0.5)), ("personal", (0.75, 1.0)), ("global", (0.5, 0.75))):
        results.setdefault(model, {"test": {}})["test"]["preference_accuracy"] = dict(zip("ab", values, strict=True))
    new = {"test": {"preference_accuracy": {"c": 0.25}}}
    results |= {
        "selected_by": "preference_accuracy",
        "held_out": {"cold_start": "mean", "zero_shot": new, "personal": new},
    }
    results["cross_clients"] = {"clients": ["a", "b"], "preference_accuracy": [[0.75, 0.5], [1.0, 1.0]]}
    (folder / "results.json").write_text(json.dumps(results))
    models, metrics, clients, matrix = tabulate_run(read_run(folder))
    assert models.title == "Preference accuracy on test, 2 clients"
    assert [row[:2] for row in models.rows] == [
        ("zero-shot", "50.0 %"),
        ("global model", "62.5 %"),
        ("personal (plora)", "87.5 %"),
        ("held-out clients, zero-shot", "25.0 %"),
        ("held-out clients, cold start (mean)", "25.0 %"),
    ]
    assert models.strong == {2}
    assert metrics.columns[:4] == ("metric", "zero-shot", "global model", "personal (plora)")
    assert metrics.rows[0] == ("exact match", "10.0 %", "–", "30.0 %", "–", "–")
    assert clients.title.startswith("Preference accuracy per client")
    # Own: .75 and 1; others': a's model on b .5, b's on a 1. On a's data b's model is better.
    assert matrix.rows == (("preference accuracy", "87.5 %", "75.0 %", "50.0 %", "1"),)


def test_vendor_and_language_make_a_grid(tmp_path: Path) -> None:
    personal = {client: number / 16 for number, client in enumerate(CLIENTS)}
    record = read_run(write_run(tmp_path / "r", dict.fromkeys(CLIENTS, 0.0), personal))
    grid = tabulate_run(record)[2]
    assert grid.columns == ("", "en", "de", "fr", "es")
    assert grid.rows[1] == ("twemoji", "0 → 25", "0 → 31", "0 → 38", "0 → 44")


def test_many_clients_lose_their_middle(tmp_path: Path) -> None:
    personal = {f"c{number}": number / 100 for number in range(100)}
    table = tabulate_run(read_run(write_run(tmp_path / "r", personal, personal)))[2]
    assert len(table.rows) == 21
    assert table.rows[0][0] == "c99"
    assert table.rows[-1][0] == "c0"
    assert "100 clients" in table.note


def test_clients_without_examples_count_nowhere(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1, "empty": None}, {"a": 0.5, "empty": None}))
    assert record.scores("personal") == {"a": 0.5}
    assert tabulate_run(record)[0].rows[1][1] == "50.0 %"


def test_the_gain_of_one_client_has_no_interval(tmp_path: Path) -> None:
    table = tabulate_run(read_run(write_run(tmp_path / "r", {"a": 0.25}, {"a": 0.5})))[0]
    assert [row[-1] for row in table.rows] == ["–", "+25.0"]


def test_fine_tuning_after_federation_shows_in_the_name(tmp_path: Path) -> None:
    stored = Run(method="fedavg-lora")
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}, stored)
    config = json.loads((folder / "config.json").read_text())
    config["run"]["train"]["finetune_steps"] = 20
    (folder / "config.json").write_text(json.dumps(config))
    assert tabulate_runs([read_run(folder)]).rows[0][1] == "fedavg-lora+ft"


def test_all_forms_show_the_same_cells(tmp_path: Path) -> None:
    record = read_comparison(write_comparison(tmp_path / "c", {"local": LOCAL, "plora": PLORA}, ZERO))
    (table,) = tabulate_comparison(record)
    assert "| **plora** | **70.0 ± 14.1 %** | **60.0 %** | **≈ +15.0 [−48.5, +78.5]** |" in to_markdown(table)
    assert ">≈ +15.0 [−48.5, +78.5]</td>" in render("table.html.j2", table=table)
    console = Console(file=io.StringIO(), width=100)
    console.print(to_rich(table))
    assert "[−48.5, +78.5]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_wider_than_the_terminal_is_cut_between_columns() -> None:
    columns = ("method", *(f"metric {number}" for number in range(9)))
    table = Table("Title", columns, (("fedavg-lora", *["12.3 % [10.0, 14.0]"] * 9),), note="Note.")
    console = Console(width=60, record=True, file=io.StringIO())
    show(console, table)
    lines = console.export_text().splitlines()
    assert sum("fedavg-lora" in line for line in lines) == 3
    assert [" ".join(lines).count(f" {number} ") for number in range(9)] == [1] * 9
    assert sum(line.count("12.3 %") for line in lines) == 9
    assert " ".join(lines).count("Title") == " ".join(lines).count("Note.") == 1
    parts = cut_to_width(table, 60)
    assert tuple(column for part in parts for column in part.columns[1:]) == columns[1:]
    assert cut_to_width(table, 500) == [table]


def test_names_are_escaped(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"<b>|": 0.1}, {"<b>|": 0.5}))
    table = tabulate_run(record)[2]
    assert "&lt;b&gt;|" in render("table.html.j2", table=table)
    assert r"&lt;b&gt;\|" in to_markdown(table)


def test_bytes() -> None:
    assert [format_bytes(count) for count in (0, 1023, 1536, 180_000, 5 * 2**20, 3 * 2**31)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "176 KiB",
        "5.0 MiB",
        "6.0 GiB",
    ]


def test_a_round_that_was_written_twice_counts_once_and_a_cut_line_not(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "loss": 3}\n{"round": 1, "loss": 2}\n{"round": 2, "lo')
    assert read_metrics(tmp_path) == [{"round": 1, "loss": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "lo\n{"round": 2}\n')
    with pytest.raises(UserError, match="line 1: not readable as JSON"):
        read_metrics(tmp_path)


def test_unfinished_and_damaged_folders_say_what_to_do(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5})
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="fedvlm train --resume"):
        read_run(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_run(folder)
    with pytest.raises(UserError, match=r"no comparison\.json"):
        read_comparison(folder)


def test_a_table_wider_than_a_phone_folds_there():
    narrow = Table("t", ("who", "how many"), (("a", "1"),))
    interval = "+1.0 [−0.5, +2.5]"
    wide = Table("t", ("method", "mean", "against local", "against others"), (("plora", "4 %", interval, interval),))
    assert 'class="fold"' not in render("table.html.j2", table=narrow)
    assert 'class="fold"' in render("table.html.j2", table=wide)
    assert '<td data-label="against local">+1.0 [−0.5, +2.5]</td>' in render("table.html.j2", table=wide)


def test_table_picture_and_sentence_have_one_interval(tmp_path):
    """Gains of −12.5, −12.5, 0 and −12.5 points: t of three degrees of freedom reaches 9.9 around −9.4."""
    zero_shot = {"a": 0.375, "b": 0.375, "c": 0.125, "d": 0.125}
    personal = {"a": 0.25, "b": 0.25, "c": 0.125, "d": 0.0}
    record = read_run(write_run(tmp_path / "r", zero_shot, personal))
    assert tabulate_run(record)[0].rows[1][6] == "−9.4 [−19.3, +0.6]"
    (ax,) = run_figures.draw_gains(record).axes
    assert [text.get_text() for text in ax.texts] == ["mean −9.4 [−19.3, +0.6]"]
    assert "That is inside the noise: the 95 % interval over clients holds zero." in describe_run(record)


def test_a_check_names_its_seeds():
    """The seed 0 alone is not read as no seed."""
    claimed = Estimate(0.42, 0.40, 0.44, "seeds")
    verdicts = [Verdict("local", claimed, seeds, 0.0) for seeds in ((0,), (0, 1))]
    table = tabulate_verdicts(find_benchmark("emoji-16"), verdicts)
    assert [row[2] for row in table.rows] == ["seed 0", "seeds 0 1"]
