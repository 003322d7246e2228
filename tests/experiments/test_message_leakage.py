"""The plan of the study of what messages tell, and its tables of lines that can be added up by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import leakage_summary
import message_leakage

from fedvlm_jax.config.option_checks import validate

STUDY = message_leakage.Study()


def line(setting, variant, seed, area, attackers=("start",)):
    def tested(test, who, value):
        scores = {"auroc": [value, 0.4, 0.9], "tpr": [0.1, 0.0, 0.2], "members": 9, "others": 9}
        return {"test": test, "knows": who, **scores, "clients": {"a": value, "b": value}}

    ranked = {"top": [0.5, 0.2, 0.8], "chance": 0.25, "rankings": 8}
    spanned = {"batch": 0.4, "unrelated": 0.3, "random": 0.06, "dimension": 8.0, "above_unrelated": 7, "spans": 8}
    return {
        "setting": setting,
        "variant": variant,
        "seed": seed,
        "shares": "B",
        "membership": [
            tested("base", "", 0.5),
            *(tested(test, who, area) for test in leakage_summary.TESTS for who in attackers),
        ],
        "attribution": [{"test": test, "knows": who, **ranked} for test in leakage_summary.TESTS for who in attackers],
        "reconstruction": [{"knows": who, **spanned} for who in attackers],
    }


LINES = [
    line("few", "plora", 0, 0.6, ("start", "others", "own")),
    line("few", "plora", 1, 0.8, ("start", "others", "own")),
    line("few", "fedavg-lora", 0, 0.7),
    line("few", "fedavg-lora", 1, 0.9),
]


def test_every_cell_is_a_run_that_can_be():
    cells = list(message_leakage.list_missing(STUDY))
    assert len(cells) == len(set(cells)) == 2 * 5 * 5
    assert {seed for _, _, seed in cells[:10]} == {0}, "a seed of everything first"
    for setting, variant, seed in cells[:10]:
        run = STUDY.make_run(setting, variant, seed)
        validate(run)
        assert run.audit.keep
        assert not run.evaluation.test


def test_what_is_measured_is_not_run_again(tmp_path):
    study = message_leakage.Study(out=tmp_path, seeds=(0,), settings=("few",), variants=("plora", "fedavg-lora"))
    (tmp_path / "lines.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    assert list(message_leakage.list_missing(study)) == [("few", "fedavg-lora", 0)]


def test_tables_by_hand():
    table = leakage_summary.tabulate_setting("few", ("plora", "fedavg-lora"), LINES)
    assert [row[:3] for row in table.rows] == [
        ("plora (B)", "the start", "0.700 ± 0.141"),
        ("plora (B)", "others' mean", "0.700 ± 0.141"),
        ("plora (B)", "the client's own", "0.700 ± 0.141"),
        ("fedavg-lora (B)", "all is known", "0.800 ± 0.141"),
    ]
    assert "bare base's loss has 0.500 ± 0.000" in table.note
    differences = leakage_summary.tabulate_differences(("few",), ("plora", "fedavg-lora"), LINES)
    assert differences.rows[0][0] == "few: plora − fedavg-lora"
    assert "−10.0" in differences.rows[0][1]


def test_the_report(tmp_path, capsys):
    leakage_summary.write(LINES, tmp_path, ("usual", "few"), ("plora", "fedavg-lora"), "python x.py")
    assert "plora" in capsys.readouterr().out
    assert json.loads((tmp_path / "message_leakage.json").read_text())["lines"] == LINES
    assert (tmp_path / "message_leakage.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        leakage_summary.write([], tmp_path, (), (), "")
