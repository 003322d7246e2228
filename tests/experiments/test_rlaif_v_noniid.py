"""The preset from a folder of RLAIF-V's form to its table, in small: one round, one method, both objectives."""

import sys
from pathlib import Path

import pytest
from rlaif_form import Form, write_folder
from tiny_run import make_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import rlaif_v_noniid

from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training.loaded_model import LoadedModel


@pytest.mark.slow
def test_the_preset_runs_goes_on_where_it_stopped_and_is_tabulated(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "data", Form(rows=60, sources={"made-up-one": 0.6, "made-up-two": 0.4}))
    preset = rlaif_v_noniid.Preset(
        path=tmp_path / "data",
        model=str(make_folder(tmp_path / "model")),
        methods=("plora",),
        seeds=2,
        rounds=1,
        rate_factors=(1.0, 0.1),
        max_answer_tokens=4,
        cache_gib=1.0,
        out=tmp_path / "out",
    )
    records = rlaif_v_noniid.run(preset)
    table = rlaif_v_noniid.tabulate(records)
    assert [row[:2] for row in table.rows] == [("–", "zero-shot"), ("sft", "plora"), ("dpo", "plora")]
    assert all("±" in cell for cell in table.rows[1][2:4])
    for objective, record in records.items():
        assert record.metric == "preference_accuracy"
        tried = {
            factor: tuned_score(tmp_path / "out" / objective / "tuning" / f"plora-{factor}") for factor in (1, 0.1)
        }
        best = max(tried, key=tried.get)
        used = read_run(record.folder_of(record.runs[0])).options["train"]["learning_rate_a"]
        assert used == best * 1e-3, tried

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(rlaif_v_noniid, "compare", fail)
    monkeypatch.setattr(LoadedModel, "federation", fail)
    assert rlaif_v_noniid.tabulate(rlaif_v_noniid.run(preset)) == table


def tuned_score(folder):
    record = read_run(folder)
    assert "test" not in record.results["personal"], "rates are chosen on validation alone"
    scores = record.scores("personal", split="validation")
    return sum(scores.values()) / len(scores)
