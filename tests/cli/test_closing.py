"""The last lines of `fedvlm train`, and the baseline that stands in them."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import tyro
from made_up import write_run

from fedvlm_jax.cli._closing import close_run, suggest_comparison
from fedvlm_jax.cli._parsing.method_and_data_options import make_signature
from fedvlm_jax.cli.compare import compare
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_setup import VECTORS
from fedvlm_jax.config.option_checks import validate_comparison
from fedvlm_jax.config.run_options import (
    EvaluationOptions,
    LoraOptions,
    Run,
    SystemOptions,
    TrainOptions,
    without_extras,
)
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.methods.config import MethodOptions, ServerOptions
from fedvlm_jax.methods.rule_based import Options as Rule
from fedvlm_jax.methods.zoo import ditto
from fedvlm_jax.reporting.score_tables import tabulate_run
from fedvlm_jax.reporting.sentences import describe_run
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.run_dir.stored_baseline import read_baseline
from fedvlm_jax.training.local_baseline import find_reason_against, make_baseline

ZERO = {"a": 0.25, "b": 0.25, "c": 0.0}
OWN = {"a": 0.5, "b": 0.75, "c": 0.25}
ALONE = {"a": 0.5, "b": 0.5, "c": 0.125}


def write_both(folder: Path, run: Run, **changes: object) -> Path:
    """Write a run and, in its folder, the one that trained alone, with other options where there are changes."""
    write_run(folder, ZERO, OWN, run)
    write_run(folder / "baseline", ZERO, ALONE, dataclasses.replace(run, method="local", **changes))
    return folder


def test_the_last_lines_put_all_three_side_by_side(tmp_path: Path) -> None:
    lines = close_run(read_run(write_both(tmp_path / "run", Run())))
    assert lines[0] == "exact match on test, mean of 3 clients"
    assert lines[1] == "  zero-shot       16.7 %"
    assert lines[2] == "  training alone  37.5 %"
    # Differences 0, 25 and 12.5 points: mean 12.5, and 4.303 * 12.5 / sqrt(3) = 31.1 around it.
    assert lines[3].startswith("  plora           50.0 %  ≈ +12.5 [−18.6, +43.6] against training alone, in points")


def test_tables_and_sentences_have_the_baseline_too(tmp_path: Path) -> None:
    record = read_run(write_both(tmp_path / "run", Run()))
    rows = [row[:2] for row in tabulate_run(record)[0].rows]
    assert rows == [("zero-shot", "16.7 %"), ("training alone (local)", "37.5 %"), ("personal (plora)", "50.0 %")]
    assert any("plora and training alone cannot be told apart" in sentence for sentence in describe_run(record))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 3}, {"train": TrainOptions(rounds=17)}, {"lora": LoraOptions(rank=4)}, {"data": make_options(alpha=1.0)}],
)
def test_a_baseline_of_another_budget_is_no_baseline(tmp_path: Path, changes: dict[str, object]) -> None:
    record = read_run(write_both(tmp_path / "run", Run(), **changes))
    assert read_baseline(record) is None
    assert len(close_run(record)) == 3
    assert "training alone (local)" not in {row[0] for row in tabulate_run(record)[0].rows}


def test_without_a_baseline_two_are_left(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", ZERO, OWN, Run()))
    assert [line.split()[0] for line in close_run(record)] == ["exact", "zero-shot", "plora"]


def test_the_baseline_has_the_same_budget_and_nothing_that_only_sharing_needs(tmp_path: Path) -> None:
    run = Run(
        method="fedavg-lora",
        cohort=4,
        train=TrainOptions(rounds=3, weighting="uniform"),
        server=ServerOptions(optimizer="adam"),
        evaluation=EvaluationOptions(cross_clients=True),
        out=tmp_path,
    )
    alone = make_baseline(run)
    assert (alone.method, alone.cohort, alone.train.rounds, alone.out) == ("local", 4, 3, tmp_path / "baseline")
    assert alone.server == ServerOptions()
    assert not alone.evaluation.cross_clients
    assert find_reason_against(run) == ""
    assert find_reason_against(Run(method="local", out=tmp_path)) == "--method local is that itself"
    assert find_reason_against(Run(method="share", method_options=Rule("b$"), out=tmp_path)) == ""
    assert (
        make_baseline(Run(method="ditto", method_options=ditto.Options(2.0), out=tmp_path)).method_options
        == MethodOptions()
    )


def parse(words: list[str]) -> Compare:
    """Read the command as `fedvlm compare` does."""
    default = make_signature(compare, words).parameters["comparison"].default
    return tyro.cli(compare.__annotations__["comparison"], args=words, default=default)


@pytest.mark.parametrize(
    "run",
    [
        Run(),
        Run(method="fedavg-lora", seed=3, cohort=8, model="florence2-base"),
        Run(data=make_options(prompt="neutral", alpha=float("inf"), languages=("en", "de"))),
        Run(method="share", method_options=Rule("decoder/.*/b$"), lora=LoraOptions(rank=4, rslora=True)),
        Run(method="ditto", method_options=ditto.Options(2.0), system=SystemOptions(wave=4, mesh="clients=1")),
        Run(evaluation=EvaluationOptions(global_model=False, metrics=("exact_match",))),
        Run(train=TrainOptions(finetune_steps=7)),
        Run(evaluation=EvaluationOptions(neighbours=5)),
    ],
)
def test_the_next_command_means_the_same_options(run: Run, tmp_path: Path) -> None:
    words = shlex.split(suggest_comparison(read_run(write_run(tmp_path / "run", ZERO, OWN, run))))
    assert words[:2] == ["fedvlm", "compare"]
    parsed = parse(words[2:])
    validate_comparison(parsed)
    assert parsed.base == without_extras(dataclasses.replace(run, method="plora", method_options=MethodOptions()))
    assert parsed.method_options.get(run.method, MethodOptions()) == run.method_options
    assert parsed.methods[0] == "local"
    assert parsed.finetune_steps == (run.train.finetune_steps or 20)
    assert parsed.neighbours == (run.evaluation.neighbours or 10)


def test_a_soft_prompt_is_held_against_one_that_is_trained_alone(tmp_path: Path) -> None:
    """Its number of vectors is the method's own, and of local training it has to be said."""
    run = Run(method="promptfl", model="clip-nano", objective="classify")
    folder = write_run(tmp_path / "run", ZERO, OWN, run)
    alone = make_baseline(dataclasses.replace(run, out=folder))
    write_run(folder / "baseline", ZERO, ALONE, alone)
    assert read_baseline(read_run(folder)) is not None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "resolved": {"prompt_vectors": VECTORS}}))
    parsed = parse(shlex.split(suggest_comparison(read_run(folder)))[2:])
    assert parsed.base.soft_prompt == alone.soft_prompt
