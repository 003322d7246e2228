"""PFIT against SFT and zero-shot, on numbers that can be worked out by hand, and what is run."""

import sys
from pathlib import Path

import pytest

from fedvlm_jax.config.option_checks import validate

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import reward_emoji as experiment


def make_line(arm, seed, reward, *, split="test", rates=(0.1, 0.2), base=0.25):
    personal = {metric: {"a": reward, "b": reward + 0.2} for metric in (*experiment.SHARES, "kl")}
    zero_shot = {metric: {"a": base, "b": base} for metric in experiment.SHARES}
    return {
        "arm": arm, "seed": seed, "rates": list(rates), "split": split,
        "scores": {"personal": personal, "zero_shot": zero_shot},
    }  # fmt: skip


LINES = [
    *(make_line(arm, 100, 0.9, split="validation") for arm in ("pfit", "sft")),
    make_line("pfit", 100, 0.3, split="validation", rates=(0.01, 0.02)),
    make_line("pfit", 0, 0.0, rates=(0.01, 0.02)),  # of a smaller grid, which had chosen other rates
    *(make_line("pfit", seed, 0.5 + 0.1 * seed) for seed in (0, 1)),
    *(make_line("sft", seed, 0.4) for seed in (0, 1)),
]


def test_differences_by_hand():
    """PFIT's clients are 0.1 ahead of SFT with one seed and 0.2 with the other; tuning runs are left out."""
    found = experiment.summarise(LINES)
    assert found["pfit"]["reward"]["by_seed"] == pytest.approx([0.6, 0.7])
    assert found["sft"]["pfit_ahead"]["mean"] == pytest.approx(0.15)
    assert found["zero-shot"]["pfit_ahead"]["mean"] == pytest.approx(0.4)
    assert found["sft"]["seeds_in_which_pfit_is_ahead"] == 2
    rows = {row[0]: row[1:] for row in experiment.tabulate(found).rows}
    assert rows["pfit"][0] == "0.650 ± 0.071"
    assert rows["pfit"][-1] == "0.1 / 0.2"
    assert rows["zero-shot"][3] == "0"


def test_rates_are_those_of_the_highest_reward_on_validation():
    lines = [
        make_line("pfit", 100, reward, split="validation", rates=(rate, rate))
        for rate, reward in ((1.0, 0.2), (2.0, 0.4))
    ]
    assert experiment.choose_rates([*lines, make_line("pfit", 0, 0.9, rates=(3.0, 3.0))]) == (2.0, 2.0)


def test_both_arms_differ_in_the_objective_alone(tmp_path):
    options = experiment.Options(out=tmp_path)
    assert experiment.TUNING_SEED not in options.seeds
    runs = [experiment.make_run(options, arm, experiment.GRID[0], 0) for arm in experiment.ARMS]
    for run in runs:
        validate(run)
    sft, pfit = runs
    assert (sft.objective, pfit.objective) == ("sft", "reward")
    assert (sft.method, sft.data, sft.train, sft.evaluation) == (pfit.method, pfit.data, pfit.train, pfit.evaluation)
