"""A tiny benchmark from the command to its line, to the table, and to the check of that line and of others."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedvlm_jax.cli.main import main
from fedvlm_jax.config import benchmark as benchmarks
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.over_seeds import estimate_mean
from fedvlm_jax.reporting import benchmark_tables
from fedvlm_jax.reporting.tables import show_all
from fedvlm_jax.run_dir.benchmark_entry import (
    ZERO_SHOT,
    Entry,
    Row,
    check_known,
    read_entries,
    read_submission,
    write_entry,
)
from fedvlm_jax.run_dir.reader import read_comparison, read_run
from fedvlm_jax.training.benchmarks.check import judge_row
from fedvlm_jax.training.benchmarks.measure import run_benchmark
from fedvlm_jax.utils.progress import SilentProgress

BOARD = Path(__file__).parents[2] / "docs" / "benchmarks.jsonl"

TINY = """
about = "Four clients."
version = 1
scored = "{scored}"
seeds = 3
tuning_seed = 100
grid = [[0.1, 0.1], [0.3, 0.3]]
finetune_steps = 2
neighbours = 3
methods = ["local", "plora", "ditto"]
seconds = 1

[rates]
local = [0.3, 0.3]

[options]
model = "{model}"

[options.data]
source = "emoji"
languages = ["en", "de"]
vendors = ["noto", "fluent"]
images_per_client = 5
validation_per_client = 2
test_per_client = 3
held_out_clients = {held_out}

[options.data.partition]
kind = "natural"

[options.lora]
rank = 2

[options.train]
rounds = 1
local_steps = 2
batch_size = 4

[options.evaluation]
select_by = "preference_accuracy"
max_answer_tokens = 4
batch_size = 6
metrics = ["exact_match"]
examples = 0
cold_start = "mean"
"""


SOME = {"methods": ("local", "plora"), "seeds": 1}


def write_benchmarks(folder, model):
    (folder / "tiny.toml").write_text(TINY.format(scored="personal", model=model, held_out=0.0))
    (folder / "joining.toml").write_text(TINY.format(scored="newcomers", model=model, held_out=0.25))
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The tests' benchmarks with a base that ships, in place of the benchmarks that do."""
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(benchmarks, "FOLDER", write_benchmarks(tmp_path / "benchmarks", "florence2-nano"))
    return benchmarks.find_benchmark("tiny")


@pytest.fixture(scope="module")
def tiny(model, tmp_path_factory):
    """The same with the tiny base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "FOLDER", write_benchmarks(tmp_path_factory.mktemp("benchmarks"), model))
        yield benchmarks.find_benchmark("tiny")


@pytest.fixture(scope="module")
def out(tiny, loaded, tmp_path_factory):
    """One of the three seeds."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    run_benchmark(tiny, replace(tiny.make_comparison(out), **SOME), SilentProgress(), loaded)
    return out


@pytest.fixture(scope="module")
def measured(out):
    (entry,) = read_entries(out / "line.json")
    return entry


def make_row(scores, method="plora"):
    rates = None if method == ZERO_SHOT else (0.1, 0.1)
    return Row(method, rates, {}, {str(seed): by for seed, by in enumerate(scores)}, 8.0, 1.0)


@pytest.fixture
def entry(shipped):
    """A line that nobody measured."""
    scores = {ZERO_SHOT: (0.1, 0.2), "local": (0.4, 0.6), "plora": (0.5, 0.7)}
    rows = tuple(make_row([{"a": low, "b": high}, {"a": low, "b": low}], name) for name, (low, high) in scores.items())
    about = {"data": "0", "weights": "1", "package": "0.1.0", "jax": "0.10", "machine": {"devices": "1 cpu"}}
    return Entry("tiny", 1, shipped.setup, shipped.metric, (0, 1), rows, **about, commit=None, seconds=3.0)


@pytest.mark.broad
def test_a_line_has_the_scores_that_the_runs_have(out, measured, tiny):
    assert (measured.benchmark, measured.version, measured.setup, measured.seeds) == ("tiny", 1, tiny.setup, (0,))
    assert measured.methods == ("local", "plora")
    assert [row.method for row in measured.rows] == [ZERO_SHOT, "local", "plora"]
    for row in measured.rows:
        for seed, scores in row.by_seed.items():
            name = "local" if row.method == ZERO_SHOT else row.method
            record = read_run(out / "runs" / f"{name}-seed{seed}")
            found = record.scores("zero_shot" if row.method == ZERO_SHOT else "personal", "preference_accuracy")
            assert scores == pytest.approx(found, abs=1e-6)
            assert len(scores) == 4
    assert any(score > 0 for row in measured.rows for score in row.by_seed[0].values())
    assert measured.jax
    assert measured.machine["devices"].endswith("cpu")
    assert measured.row("plora").upload > measured.row("local").upload == 0


@pytest.mark.broad
def test_known_rates_are_used_and_others_are_tuned_without_a_look_at_test(out, measured, tiny):
    assert measured.row("local").rates == tiny.rates["local"]
    scores = []
    for number, (rate_a, rate_b) in enumerate(tiny.grid):
        record = read_comparison(out / "tuning" / str(number))
        assert (record.methods, record.seeds) == (["plora"], [100])
        run = read_run(out / "tuning" / str(number) / "runs" / "plora-seed100")
        assert (run.options["train"]["learning_rate_a"], run.options["train"]["learning_rate_b"]) == (rate_a, rate_b)
        assert "test" not in run.results["personal"]
        scores.append(estimate_mean(record.scores("plora", split="validation")).mean)
    assert measured.row("plora").rates == tiny.grid[scores.index(max(scores))]
    assert read_run(out / "runs" / "plora-seed0").options["train"]["learning_rate_a"] == measured.row("plora").rates[0]


@pytest.mark.broad
def test_a_finished_benchmark_is_only_read(out, measured, tiny, loaded):
    show = SilentProgress()
    assert run_benchmark(tiny, replace(tiny.make_comparison(out), **SOME), show, loaded) == measured
    assert not show.lines


def test_the_table_fits_eighty_columns_and_says_what_it_is_of(entry, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = benchmark_tables.tabulate_entry(entry)
    show_all([table])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "2 of 3 seeds" in text
    assert "jax" in text
    assert {row[0] for row in table.rows} == {"local", "plora", ZERO_SHOT}
    mean = estimate_mean(entry.row("plora").by_seed)
    assert next(row for row in table.rows if row[0] == "plora")[1].startswith(f"{100 * mean.mean:.1f} [")


@pytest.mark.broad
def test_a_line_reproduces_on_the_command_line(tiny, measured, tmp_path, capsys):
    (tmp_path / "line.json").write_text(write_entry(measured) + "\n")
    main(["compare", "--benchmark", "tiny", "--check", str(tmp_path / "line.json"), "--out", str(tmp_path / "rerun")])
    shown = capsys.readouterr().out
    assert "NO" not in shown
    assert shown.count("yes") == 2
    assert sorted(path.name for path in (tmp_path / "rerun" / "runs").iterdir()) == ["local-seed0", "plora-seed0"]
    assert not (tmp_path / "rerun" / "tuning").exists()
    # The same folder, and a line whose scores nobody can get.
    wrong = replace(
        measured.row("plora"),
        scores={seed: dict.fromkeys(by, 1.0) for seed, by in measured.row("plora").scores.items()},
    )
    (tmp_path / "line.json").write_text(write_entry(replace(measured, rows=(*measured.rows[:2], wrong))))
    words = ["compare", "--benchmark", "tiny", "--check", str(tmp_path / "line.json"), "--out", str(tmp_path / "rerun")]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--methods", "local", "plora"])
    assert stop.value.code == 1
    assert "NO" in capsys.readouterr().out


@pytest.mark.slow
def test_newcomers_are_scored_with_what_they_join_with(tiny, loaded, tmp_path):
    benchmark = benchmarks.find_benchmark("joining")
    comparison = replace(benchmark.make_comparison(tmp_path / "out"), methods=("local",), seeds=1)
    entry = run_benchmark(benchmark, comparison, SilentProgress(), loaded)
    record = read_run(tmp_path / "out" / "runs" / "local-seed0")
    for method, model in (("local", "personal"), (ZERO_SHOT, "zero_shot")):
        found = record.scores(f"held_out/{model}", "preference_accuracy")
        assert entry.row(method).by_seed[0] == pytest.approx(found, abs=1e-6)
    assert len(entry.row("local").by_seed[0]) == 1


@pytest.mark.parametrize(
    ("rerun", "expected"), [(0.50, True), (0.61, True), (0.63, False), (0.34, True), (0.32, False)]
)
def test_a_row_reproduces_within_its_interval(rerun, expected):
    """Seeds at 0.5, 0.5, 0.6: mean 0.533, standard error 0.0333, t with two degrees of freedom 4.303: 0.143 each way.

    The rerun of the first two seeds is held against the same two of the line.
    """
    claimed = make_row([{"a": 0.4, "b": 0.6}, {"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.6}])
    again = make_row([{"a": rerun, "b": rerun + 0.05}, {"a": rerun, "b": rerun + 0.05}])
    verdict = judge_row(claimed, again)
    assert verdict.difference == pytest.approx(rerun + 0.025 - 0.5)
    assert verdict.claimed.high - verdict.claimed.mean == pytest.approx(0.1434, abs=1e-4)
    assert verdict.reproduced is expected


def test_other_clients_are_no_rerun():
    with pytest.raises(UserError, match="the clients of plora in the line are not those of the benchmark"):
        judge_row(make_row([{"a": 0.4}]), make_row([{"b": 0.4}]))


def spoil(entry, **changes):
    return json.dumps({**json.loads(write_entry(entry)), **changes})


def spoil_row(entry, **changes):
    rows = json.loads(write_entry(entry))["rows"]
    return spoil(entry, rows=[*rows[:-1], {**rows[-1], **changes}])


def make_other_numbers(entry):
    """A method that is trained with one number, and fine-tuned as if it had been with another."""
    rows = json.loads(write_entry(entry))["rows"]
    both = [
        {**rows[-1], "method": name, "options": {"lambda_": size}} for name, size in (("ditto", 0.5), ("ditto+ft", 1.0))
    ]
    return spoil(entry, rows=[rows[0], *both])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda entry: "", "has no line"),
        (lambda entry: "[1]", "expected a JSON object"),
        (lambda entry: "[" * 100_000, "not readable as JSON"),
        (lambda entry: spoil(entry, setup="0" * 16), "the two cannot be compared"),
        (lambda entry: spoil(entry, benchmark="other"), "has 0 lines of tiny"),
        (lambda entry: spoil(entry, seeds=[0, 2]), "expected 0, 1 and so on"),
        (lambda entry: spoil(entry, seeds=[]), "expected 0, 1 and so on"),
        (lambda entry: spoil(entry, rows=[]), "expected a row for every method"),
        (lambda entry: spoil(entry, extra=1), "unknown option extra"),
        (lambda entry: spoil(entry, seconds="nan"), "seconds that cannot be"),
        (lambda entry: spoil_row(entry, upload=1e300), "plora has bytes or seconds that cannot be"),
        (lambda entry: spoil_row(entry, rates=[1.0, 1.0]), "not in the grid"),
        (lambda entry: spoil_row(entry, rates=None), "has no learning rates"),
        (lambda entry: spoil_row(entry, method="local"), "a row for every method, and one only"),
        (lambda entry: spoil_row(entry, scores={"0": {"a": 1.5}, "1": {"a": 0.5}}), "a score of 1.5"),
        (lambda entry: spoil_row(entry, scores={"0": {"a": math.nan}, "1": {"a": 0.5}}), "a score of nan"),
        (lambda entry: spoil_row(entry, scores={"0": {"a": 0.5}}), "scores of other seeds"),
        (
            lambda entry: spoil_row(entry, scores={"0": {"a": 0.5, "b": 0.7}, "1": {"b": 0.7}}),
            "plora has scores of other clients than zero-shot",
        ),
        (lambda entry: spoil_row(entry, method="x\x1b[31m" * 50), "this version has no method x"),
        (lambda entry: spoil_row(entry, options={"lambda_": 3}), "unknown option the numbers of plora.lambda_"),
        (lambda entry: spoil_row(entry, method="plora+knn+ft"), "this version has no method plora+knn+ft"),
        (lambda entry: spoil(entry, metric="cider\x1b[31m"), "and tiny is judged by preference_accuracy"),
        (lambda entry: spoil(entry, rows=json.loads(write_entry(entry))["rows"][:1]), "no row but that of zero-shot"),
        (lambda entry: spoil(entry, version=10**4000), "the two cannot be compared"),
        (lambda entry: spoil(entry, **{"x\nfedvlm: fine" + "y" * 9999: 1}), "unknown option x\\nfedvlm: fine"),
        (lambda entry: spoil_row(entry, scores={"0": {"\x1b" * 9999: "x"}}), "expected float"),
        (
            lambda entry: spoil_row(entry, method="share", options={"rule": "/b$"}),
            "was measured on another version of the data",
        ),
        (make_other_numbers, "the line has rows of ditto with other numbers"),
        (lambda entry: spoil(entry, data="0"), "was measured on another version of the data"),
        (lambda entry: write_entry(entry) + "\n" + write_entry(entry), "has 2 lines of tiny"),
    ],
)
def test_a_stranger_s_line_is_refused_in_a_line(entry, make, message, tmp_path, capsys):
    (tmp_path / "line.json").write_text(make(entry))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--benchmark", "tiny", "--check", str(tmp_path / "line.json"), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("fedvlm: ")]
    assert stop.value.code == 2
    assert len(said) == 1
    assert message in said[0]
    assert len(said[0]) < 1000
    assert "\x1b" not in shown
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "rolora"], "--methods rolora: the line has rows of local, plora"),
        (["--seeds", "3"], "--seeds is 3, and the line has 2 seeds"),
        (["--methods", "plora", "ditto", "--method.ditto.lambda", "0.5"], "leave out --method.ditto.lambda"),
    ],
)
def test_rows_that_the_line_does_not_have_are_refused(entry, words, message, tmp_path, capsys):
    (tmp_path / "line.json").write_text(write_entry(entry))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--benchmark", "tiny", "--check", str(tmp_path / "line.json"), "--out", str(tmp_path), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_text_is_refused(shipped, tmp_path):
    (tmp_path / "line.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no UTF-8"):
        read_submission(tmp_path / "line.json", shipped)
    with pytest.raises(UserError, match="No such file"):
        read_submission(tmp_path / "none.json", shipped)
    with pytest.raises(UserError, match="no regular file"):
        read_submission(tmp_path, shipped)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "nothing"], "--benchmark nothing: there are joining, tiny"),
        (["--check", "x.json"], "say which with --benchmark NAME"),
        (["--benchmark", "tiny", "--rounds", "9"], "--train.rounds is settled by --benchmark tiny"),
        (["--benchmark", "tiny", "--data", "rlaif-v"], "--data is settled by --benchmark tiny"),
        (["--benchmark", "tiny", "--seeds", "4"], "--seeds is 4, and tiny has 3"),
        (["--benchmark", "tiny", "--check", "none.json"], "none.json"),
        (["--benchmark", "tiny", "--out"], "--out"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(shipped, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_lines_of_the_board_can_be_checked(tmp_path):
    entries = read_entries(BOARD)
    assert entries
    for entry in entries:
        benchmark = benchmarks.find_benchmark(entry.benchmark)
        assert entry.version <= benchmark.version
        (tmp_path / "line.json").write_text(write_entry(entry))
        if entry.setup == benchmark.setup:
            assert read_submission(tmp_path / "line.json", benchmark) == entry
            check_known(entry, entry.methods)


def test_a_board_has_every_benchmark(entry, tmp_path):
    old = replace(entry, setup="0" * 16)
    (tmp_path / "board.jsonl").write_text(f"{write_entry(entry)}\n{write_entry(old)}\n")
    text = benchmark_tables.write_board(tmp_path / "board.jsonl")
    assert text.index("### joining") < text.index("Nobody has entered") < text.index("### tiny")
    assert text.count("plora") == 1
    assert "1 line of other set-ups" in text
