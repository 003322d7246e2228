"""Definitions of benchmarks: what their files say reaches the run, and what a user may change."""

from dataclasses import replace

import pytest

from fedvlm_jax.config import benchmark as benchmarks
from fedvlm_jax.config.benchmark import check_comparison, find_benchmark, list_benchmarks, list_untuned
from fedvlm_jax.config.option_checks import plain
from fedvlm_jax.config.run_options import MethodOptions, methods_available
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.config import find_method_options

SETUPS = {
    "emoji-16": (1, "537e2725c90dc52f"),
    "emoji-16-neutral": (1, "ade64b20323c61ca"),
    "emoji-newcomers": (1, "7f35e149ea9db0ff"),
    "photos-languages": (1, "375f0739d51412c6"),
}
"""A benchmark whose numbers change needs another version: lines of the table name both."""


def test_a_change_of_a_benchmark_is_another_version():
    found = {name: find_benchmark(name) for name in list_benchmarks()}
    assert {name: (each.version, each.setup) for name, each in found.items()} == SETUPS


@pytest.mark.parametrize("name", list_benchmarks())
def test_a_benchmark_can_be_run_as_it_stands(name):
    benchmark = find_benchmark(name)
    comparison = benchmark.make_comparison()
    check_comparison(benchmark, comparison)
    assert {plain(method) for method in (*benchmark.methods, *benchmark.rates)} <= {*methods_available()}
    assert {*benchmark.rates.values()} <= {*benchmark.grid}
    assert benchmark.tuning_seed not in range(benchmark.seeds)
    assert benchmark.seconds > 0
    assert "\n" not in benchmark.about


def test_a_file_says_what_is_run():
    run = find_benchmark("emoji-16-neutral").run
    assert (run.data.prompt, run.data.images_per_client, run.data.partition.alpha) == ("neutral", 20, 0.3)
    assert (run.train.rounds, run.train.local_steps, run.train.batch_size) == (12, 4, 8)
    photos = find_benchmark("photos-languages").run.data
    assert (photos.source, photos.clients_per_language, photos.test_share) == ("photos", 2, 0.4)
    newcomers = find_benchmark("emoji-newcomers")
    assert (newcomers.scored, newcomers.run.data.held_out_clients) == ("newcomers", 0.25)
    assert newcomers.run.evaluation.cold_start == "mean"


def test_words_and_rows_are_not_in_the_digest(tmp_path, monkeypatch):
    """More methods, or another sentence, make no other benchmark; another number does."""
    text = (benchmarks.FOLDER / "emoji-16.toml").read_text(encoding="utf-8")
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    setups = []
    for old, new in (("", ""), ('"plora", ', ""), ("Sixteen", "16"), ("rounds = 12", "rounds = 13")):
        (tmp_path / "emoji-16.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
        setups.append(find_benchmark("emoji-16").setup)
    assert setups[0] == setups[1] == setups[2] != setups[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 6}, "--seeds is 6, and emoji-16 has 5"),
        ({"finetune_steps": 30}, "--finetune-steps is settled"),
        ({"rounds": 20}, "--train.rounds is settled by --benchmark emoji-16, as 12"),
        ({"seed": 7}, "--seed is settled"),
        ({"compute": "bfloat16"}, "--system.compute is settled"),
        ({"model": "smolvlm-nano"}, "--model is settled"),
    ],
)
def test_what_a_benchmark_settles_is_not_changed(changes, message):
    benchmark = find_benchmark("emoji-16")
    whole = benchmark.make_comparison()
    base = whole.base
    run = {name: changes[name] for name in ("seed", "model") if name in changes}
    if "rounds" in changes:
        run["train"] = replace(base.train, rounds=20)
    if "compute" in changes:
        run["system"] = replace(base.system, compute="bfloat16")
    own = {name: changes[name] for name in ("seeds", "finetune_steps") if name in changes}
    with pytest.raises(UserError, match=message):
        check_comparison(benchmark, replace(whole, base=replace(base, **run), **own))


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap+ft"])
def test_a_prompt_method_is_refused_before_anything_is_read(method):
    benchmark = find_benchmark("emoji-16")
    comparison = replace(benchmark.make_comparison(), methods=("local", method))
    with pytest.raises(UserError, match=rf"--methods {method[:8]}.* and emoji-16 has florence2-nano, which writes"):
        check_comparison(benchmark, comparison)


def test_where_and_how_fast_is_free(tmp_path):
    benchmark = find_benchmark("photos-languages")
    whole = benchmark.make_comparison(tmp_path)
    base = replace(whole.base, data=whole.base.data.replace(path=tmp_path), system=replace(whole.base.system, wave=2))
    check_comparison(benchmark, replace(whole, methods=("local", "rolora"), seeds=1, base=base))


def test_new_methods_and_other_numbers_are_tuned():
    benchmark = find_benchmark("emoji-16")
    changed = find_method_options("ditto")(lambda_=0.7)
    comparison = replace(
        benchmark.make_comparison(),
        methods=("local", "rolora", "ditto", "fedavg-lora+ft", "rolora+ft"),
        method_options={"ditto": changed, "rolora": MethodOptions()},
    )
    assert list_untuned(benchmark, comparison) == ("rolora", "ditto", "rolora+ft")


def test_a_name_that_there_is_not_is_told():
    with pytest.raises(UserError, match="--benchmark emoji: there are emoji-16, "):
        find_benchmark("emoji")
