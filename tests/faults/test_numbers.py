"""Numbers: how they are written on the command line, and the ranges that all of them have."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from fedvlm_jax.cli._parsing.numbers import read_float, read_int
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_checks import write_flag
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import BOUND, read_bound
from fedvlm_jax.utils.option_ranges import LARGEST, LARGEST_SEED, check_ranges, list_options


def change(options: Any, path: str, value: object) -> Any:
    """The same options with one of them changed, a tuple where it is one."""
    name, _, rest = path.partition(".")
    before = getattr(options, name)
    after = change(before, rest, value) if rest else ((value,) if isinstance(before, tuple) else value)
    return dataclasses.replace(options, **{name: after})


def list_paths(kind: type, asked: type, prefix: str = "") -> Iterator[str]:
    """List the fields of a dataclass that take an `asked`, nested as deeply as they are."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from list_paths(typing.cast(type, hint), asked, f"{prefix}{name}.")
        elif hint is asked or asked in typing.get_args(hint):
            yield prefix + name


COUNTS = [path for path in list_paths(Run, int) if path != "seed"]
FLOATS = list(list_paths(Run, float))


def test_the_options_are_found() -> None:
    assert {"train.rounds", "cohort", "lora.ranks", "data.min_examples", "system.wave"} <= set(COUNTS)
    assert {"data.max_bad_share", "train.local_epochs", "lora.alpha", "system.cache_gib"} <= set(FLOATS)
    assert len(COUNTS) >= 22
    assert len(FLOATS) >= 18


def test_numbers_of_the_chosen_method_and_of_its_data_have_ranges() -> None:
    for run in (Run(), Run(method="pfedme", data=make_options("x.parquet", "dirichlet")), Run(method="fedrpca")):
        for option in list_options(run):
            if type(option.value) is float:
                assert option.bounds, option.flag


@pytest.mark.parametrize("value", [2**31, 2**63, 2**64, 10**30, -(2**63)])
@pytest.mark.parametrize("path", COUNTS)
def test_no_count_is_larger_than_devices_count(path: str, value: int) -> None:
    flag = write_flag(path)
    with pytest.raises(UserError, match=rf"{flag} (is|-9|means nothing).*") as caught:
        validate(change(Run(), path, value))
    assert "\n" not in str(caught.value)


def test_no_batch_is_larger_than_memory() -> None:
    with pytest.raises(UserError, match=r"--evaluation\.batch-size is 65537: .* at most 65536"):
        validate(change(Run(), "evaluation.batch_size", 2**16 + 1))


@pytest.mark.parametrize("path", FLOATS)
def test_no_number_is_none(path: str) -> None:
    with pytest.raises(UserError, match=write_flag(path) + " is nan"):
        validate(change(Run(), path, math.nan))


@pytest.mark.parametrize("path", FLOATS)
def test_no_number_is_infinite(path: str) -> None:
    with pytest.raises(UserError, match=write_flag(path)):
        validate(change(Run(), path, math.inf))


@pytest.mark.parametrize("gib", ["1e300", "1e308"])
def test_no_cache_has_more_bytes_than_a_number_can_say(gib: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--system\.cache-gib is 1e\+30[08]: it must be"):
        validate(change(Run(), "system.cache_gib", float(gib)))
    monkeypatch.setenv(BOUND, gib)
    with pytest.raises(UserError, match=rf"{BOUND} is '{gib}': it must be a number of GiB above 0"):
        read_bound()


def test_seeds_are_those_that_jax_can_tell_apart() -> None:
    check_ranges(Run(seed=LARGEST_SEED))
    with pytest.raises(UserError, match=f"--seed is {2**32}: it must be a whole number of at most {LARGEST_SEED}"):
        validate(Run(seed=2**32))
    with pytest.raises(UserError, match="--seed is -1"):
        validate(Run(seed=-1))
    with pytest.raises(UserError, match=f"--seed {LARGEST_SEED} and --seeds 2 go beyond"):
        validate_comparison(Compare(seeds=2, base=Run(seed=LARGEST_SEED)))
    for name in ("seeds", "processes", "finetune_steps", "neighbours"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {LARGEST + 1}: it must be"):
            validate_comparison(dataclasses.replace(Compare(), **{name: LARGEST + 1}))


@pytest.mark.parametrize("text", ["1_000", "٣", "５", " 5", "5 ", "1e3", "0x10", "1.0", "", "--", "five", "1,000", "१"])
def test_what_is_no_whole_number_in_plain_digits(text: str) -> None:
    with pytest.raises(ValueError, match="not a whole number in plain digits"):
        read_int(text)


@pytest.mark.parametrize("text", ["1_0.5", "٣.5", " 0.5", "0.5 ", "1e", ".", "", "0x1p3", "0,5", "1e3_0"])
def test_what_is_no_number_in_plain_digits(text: str) -> None:
    with pytest.raises(ValueError, match="not a number in plain digits"):
        read_float(text)


def test_numbers_as_they_are_written() -> None:
    assert [read_int(text) for text in ("0", "-7", "+7", "007")] == [0, -7, 7, 7]
    assert [read_float(text) for text in ("1", "-.5", "5.", "1e-3", "inf", "1E3")] == [1, -0.5, 5, 0.001, math.inf, 1e3]
    with pytest.raises(ValueError, match=r"^9{30}… \(5000 characters\) is too large") as caught:
        read_int("9" * 5000)  # Python itself stops at 4,300 digits, with another message
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--clients", "1e23"], "--clients: 1e23 is not a whole number in plain digits, like 1000 (fedvlm"),
        (["train", "--train.rounds", "1_000"], "--rounds: 1_000 is not a whole number"),
        (["train", "--lora.ranks", "2", "4_0"], "--lora.ranks: 4_0 is not a whole number"),
        (["train", "--rounds", "1\n2"], r"--rounds: 1\n2 is not a whole number"),
        (["train", "--data.alpha", "٣"], "--data.alpha: ٣ is not a number in plain digits"),
        (["train", "--cohort", str(2**64)], f"--cohort is {2**64}: it must be a whole number of at most {LARGEST}"),
        (["compare", "--seeds", str(10**19)], f"--seeds is {10**19}: it must be a whole number of at most {LARGEST}"),
        (["data", "--seed", str(2**32)], f"--seed is {2**32}: it must be a whole number of at most {LARGEST_SEED}"),
        (["explain", "--clients", str(2**33)], f"--clients is {2**33}: it must be"),
        (["plan", "--sizes.examples", str(2**33)], f"--sizes.examples is {2**33}: it must be"),
    ],
)
def test_the_commands_say_so_in_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert shown.err.startswith(f"fedvlm: {told}")
    assert shown.err.count("\n") == 1
