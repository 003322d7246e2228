"""What accuracy costs in bytes, what clients gain, and the health of the aggregation: read and drawn as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_up import write_comparison, write_run

from fedvlm_jax.reporting.figures import comparison_figures, cost_pareto_figures, diagnostics_figures
from fedvlm_jax.reporting.figures.cost_pareto_figures import Cost
from fedvlm_jax.reporting.figures.round_lines import read_rounds
from fedvlm_jax.run_dir.reader import read_comparison, read_run

SCORES = {
    "local": {0: {"a": 0.4, "b": 0.6}, 1: {"a": 0.5, "b": 0.7}},
    "plora": {0: {"a": 0.5, "b": 0.6}, 1: {"a": 0.8, "b": 0.7}},
}
ZERO = {seed: {"a": 0.1, "b": 0.1} for seed in (0, 1)}


def test_the_front_by_hand() -> None:
    costs = [
        Cost("zero-shot", 0, 10, None),
        Cost("local", 0, 50, 1.0),
        Cost("cheap", 10, 49, 1.0),  # for free there is more
        Cost("middle", 20, 60, 1.0),
        Cost("twin", 20, 60, 1.0),  # matched, not beaten: both stay
        Cost("dear", 90, 60, 1.0),
        Cost("best", 99, 61, 1.0),
    ]
    assert [cost.method for cost in cost_pareto_figures.find_front(costs)] == ["local", "middle", "twin", "best"]


def test_costs_are_those_of_all_rounds(tmp_path: Path) -> None:
    record = read_comparison(write_comparison(tmp_path / "c", SCORES, ZERO))
    costs = {cost.method: cost for cost in cost_pareto_figures.read_costs(record, read_rounds(record))}
    assert costs["plora"].sent == 8 * 360_000
    assert costs["local"].sent == 0
    assert costs["plora"].mean == pytest.approx(65)
    assert costs["plora"].std == pytest.approx(20 / np.sqrt(2))  # seeds at 55 and 75
    (ax,) = cost_pareto_figures.draw_pareto(list(costs.values()), "exact_match").axes
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks[0] == "nothing"
    assert "zero-shot 10.0, off the scale" in {text.get_text() for text in ax.texts}
    assert {text.get_text(): text.get_weight() for text in ax.texts if text.get_text() in SCORES} == {
        "local": "bold",
        "plora": "bold",
    }


def test_methods_whose_folder_is_gone_have_no_cost(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", SCORES, ZERO)
    for seed in (0, 1):
        (folder / f"plora-{seed}" / "metrics.jsonl").unlink()
    record = read_comparison(folder)
    assert [cost.method for cost in cost_pareto_figures.read_costs(record, read_rounds(record))] == [
        "zero-shot",
        "local",
    ]


def test_gains_have_the_interval_over_seeds(tmp_path: Path) -> None:
    # Client a gains 10 and 30 points: mean 20, standard error 10, t(1) = 12.706. Client b gains nothing, twice.
    found = comparison_figures.read_gains(read_comparison(write_comparison(tmp_path / "c", SCORES, ZERO)))["plora"]
    assert found.clients == ["a", "b"]
    assert found.mean == pytest.approx([20, 0])
    assert found.low == pytest.approx([20 - 127.06, 0], abs=0.01)
    assert found.high == pytest.approx([20 + 127.06, 0], abs=0.01)
    without = {"plora": SCORES["plora"]}
    assert comparison_figures.read_gains(read_comparison(write_comparison(tmp_path / "d", without, ZERO))) == {}


def test_an_interval_without_a_width_convinces_nobody(tmp_path: Path) -> None:
    scores = {"local": {0: {"a": 0.4}, 1: {"a": 0.4}}, "plora": {0: {"a": 0.5}, 1: {"a": 0.5}}}
    record = read_comparison(write_comparison(tmp_path / "c", scores, {seed: {"a": 0.1} for seed in (0, 1)}))
    (ax,) = comparison_figures.draw_method_gains(comparison_figures.read_gains(record), "exact_match").axes
    _, filled, hollow = ax.collections
    assert len(filled.get_offsets()) == 0
    assert len(hollow.get_offsets()) == 1


def test_health_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}, curve=(0.2, 0.3))
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    tuned = {**lines[-1], "round": 5, "method": "local", "aggregation_error": 9.0}  # after the federation
    lines = [{**line, "method": "plora"} for line in lines] + [tuned]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(folder)
    axes = diagnostics_figures.draw_health(record).axes
    titles = [ax.get_title(loc="left") for ax in axes if ax.axison]
    assert titles == [
        "Aggregation error, %",
        "Angle between clients' A, degrees",
        "Dissimilarity of updates",
        "Validation exact match, %",
    ]
    whole, decoder, encoder = axes[0].lines
    assert list(whole.get_xdata()) == [1, 2, 3, 4], "nothing is aggregated while clients fine-tune"
    assert whole.get_ydata() == pytest.approx([1, 2, 3, 4])
    assert encoder.get_ydata() == pytest.approx([2, 4, 6, 8])
    assert decoder.get_ydata() == pytest.approx([0.5, 1, 1.5, 2])
    assert {text.get_text() for text in axes[0].texts} == {"all", "encoder", "decoder"}
    after, before = axes[3].lines
    assert before.get_ydata() == pytest.approx([18, 28])
    assert after.get_ydata() == pytest.approx([20, 30])
    assert all(ax.get_ylim()[0] == 0 for ax in axes[:3])


def test_health_of_a_comparison_is_the_mean_over_seeds(tmp_path: Path) -> None:
    scores = {**SCORES, "plora+ft": SCORES["plora"]}
    folder = write_comparison(tmp_path / "c", scores, ZERO)
    path = folder / "plora-1" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"angle_a": 10.0', '"angle_a": 20.0'))
    rounds = read_rounds(read_comparison(folder))
    axes = diagnostics_figures.draw_method_health(rounds).axes
    assert {text.get_text() for text in axes[1].texts} == {"local", "plora"}, "plora+ft has plora's federation"
    assert axes[1].lines[1].get_ydata()[:2] == pytest.approx([15, 20])
    gain = axes[3].lines[1]
    assert gain.get_ydata() == pytest.approx([2, 2, 2, 2])


def test_rounds_without_health_have_no_picture(tmp_path: Path) -> None:
    lines = [{"round": 1, "loss": 1.0, "validation": None}]
    assert diagnostics_figures.list_panels([lines]) == []
