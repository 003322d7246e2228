"""The noise or the rounds of a run, settled once its clients are known."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_checks import for_method
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import LoraOptions, Run, TrainOptions, methods_available
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods.config import LocalOptions
from fedvlm_jax.privacy import accounting
from fedvlm_jax.privacy.accounting import find_epsilon
from fedvlm_jax.privacy.budget import (
    Budget,
    describe_budget,
    describe_coverage,
    lengthen_budget,
    read_coverage,
    settle,
)
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.privacy.sampling import Sampling
from fedvlm_jax.utils.serialization import decode, encode

ALL = PrivacyOptions(noise=4.0, delta=1e-3, sampling="all")


@pytest.fixture
def fast(monkeypatch):
    """ε by its fast bound, which these tests do not ask the size of."""
    monkeypatch.setattr(accounting, "LARGE", 0.0)
    accounting.find_noise.cache_clear()
    yield
    accounting.find_noise.cache_clear()


def change(options: PrivacyOptions = ALL, **changed: object) -> PrivacyOptions:
    return dataclasses.replace(options, **changed)


def test_the_noise_of_an_epsilon_is_that_of_all_rounds(fast):
    budget = settle(change(noise=0.0, epsilon=3.0), clients=16, cohort=None, rounds=20)
    assert (budget.rounds, budget.limit) == (20, 3.0)
    assert 2.99 < budget.epsilon <= 3
    assert budget.epsilon == find_epsilon(budget.noise, Sampling("all", 16, 16, 16), 20, 1e-3) == budget.spent(20)
    assert budget.spent(20) == budget.spent(25) > budget.spent(19) > budget.spent(1) > 0


def test_an_epsilon_beside_noise_cuts_the_rounds(fast):
    budget = settle(change(epsilon=3.0), clients=16, cohort=None, rounds=50)
    assert budget.noise == 4
    assert budget.rounds < 50
    assert budget.spent(budget.rounds) <= 3 < find_epsilon(4.0, budget.drawn, budget.rounds + 1, 1e-3)
    told = describe_budget(budget, 50)
    assert told.endswith(f"; stops after {budget.rounds} of 50 rounds, where epsilon 3 is spent")
    assert "\n" not in told
    again = settle(change(epsilon=3.0), clients=16, cohort=None, rounds=budget.rounds)
    assert again == budget
    assert "stops" not in describe_budget(again, budget.rounds)


def test_noise_alone_has_no_bound(fast):
    budget = settle(ALL, clients=16, cohort=None, rounds=50)
    assert (budget.rounds, budget.limit) == (50, 0)
    assert lengthen_budget(budget, 60).epsilon == find_epsilon(4.0, budget.drawn, 60, 1e-3)


def test_more_rounds_than_epsilon_allows_are_refused(fast):
    budget = settle(change(epsilon=3.0), clients=16, cohort=None, rounds=5)
    longer = lengthen_budget(budget, 6)
    assert longer == dataclasses.replace(budget, rounds=6, epsilon=longer.spent(6))
    most = settle(change(epsilon=3.0), clients=16, cohort=None, rounds=100).rounds
    with pytest.raises(UserError, match=rf"--train.rounds 100: epsilon 3 of the run is spent after {most} rounds"):
        lengthen_budget(budget, 100)
    turns = settle(change(mechanism="banded", bands=2), clients=16, cohort=None, rounds=6)
    with pytest.raises(UserError, match="banded is planned for the 6 rounds"):
        lengthen_budget(turns, 8)


@pytest.mark.parametrize(
    ("options", "clients", "cohort", "expected"),
    [
        (change(delta=0.0625), 16, None, r"--privacy.delta 0.0625 is not below 1 / 16 clients"),
        (change(epsilon=0.01), 16, None, r"--privacy.epsilon 0.01: the first round spends .* or --privacy.noise 4"),
        (
            change(noise=1.0, sampling="poisson", quantile=0.5),
            16,
            8,
            "rounds of more than 10 clients on aver",
        ),
        (change(sampling="poisson"), 16, 17, "--cohort 17: there are only 16 clients"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, clients, cohort, expected, fast):
    with pytest.raises(UserError, match=expected) as caught:
        settle(options, clients, cohort, rounds=50)
    assert "\n" not in str(caught.value)


def test_it_is_stored_and_read_again(fast):
    budget = settle(change(quantile=0.5), clients=100, cohort=None, rounds=2)
    assert decode(Budget, json.loads(json.dumps(encode(budget)))) == budget
    stored = json.loads(json.dumps(describe_coverage(budget)))
    assert read_coverage(stored) == budget
    assert "shared part" in stored["covers"]
    assert "private factors" in stored["does_not_cover"]
    assert "whether a client was drawn" not in stored["does_not_cover"]
    drawn = settle(change(sampling="fixed"), clients=100, cohort=5, rounds=2)
    assert "whether a client was drawn" in describe_coverage(drawn)["does_not_cover"]


POISSON = PrivacyOptions(epsilon=8.0)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run(privacy=PrivacyOptions(clip=2.0)), "--privacy.clip means nothing without noise: say --privacy.epsilon"),
        (Run(privacy=PrivacyOptions(sampling="all")), "--privacy.sampling means nothing without noise"),
        (Run(privacy=POISSON), "--privacy.sampling poisson draws clients: say how many on average with --cohort"),
        (Run(privacy=change(POISSON, sampling="fixed")), "--privacy.sampling fixed draws clients: say how many with"),
        (Run(privacy=ALL, cohort=4), "--privacy.sampling all and --cohort 4 exclude each other"),
        (Run(privacy=change(bands=3)), "--privacy.bands means nothing to --privacy.mechanism gaussian"),
        (
            Run(privacy=change(mechanism="banded", bands=1)),
            "--privacy.bands 1: noise is correlated over 2 round",
        ),
        (Run(privacy=change(mechanism="banded", bands=11)), "at most over all --train.rounds 10"),
        (Run(privacy=change(mechanism="banded", quantile=0.5)), "--privacy.quantile and --privacy.mechanism banded"),
        (
            Run(privacy=POISSON, cohort=4, participation=ParticipationOptions(sampling="size")),
            "--participation.sampling does not go with --privacy",
        ),
        (
            Run(privacy=ALL, local=LocalOptions(scaffold=True), train=TrainOptions(optimizer="sgd")),
            "--local.scaffold does not go with --privacy",
        ),
        (Run(privacy=ALL, lora=LoraOptions(rank=8, ranks=(2, 8))), "--lora.ranks does not go with --privacy"),
        (Run(privacy=ALL, messages=MessageOptions(pool="median")), "--messages.pool does not go with --privacy"),
        (
            Run(privacy=ALL, method="flora"),
            "--privacy.* does not go with --method flora, because its server needs",
        ),
        (Run(privacy=ALL, method="local"), "--privacy.noise does not go with --method local, because no client sends"),
        (Run(privacy=change(mechanism="banded"), method="rolora"), "banded does not go with --method rolora"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_a_line(run, expected):
    with pytest.raises(UserError) as caught:
        validate(run)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_linear_methods_take_it_and_the_others_do_not():
    """By what each declares: the list is here so that a change is seen."""
    refused = []
    for name in methods_available():
        try:
            validate(Run(method=name, privacy=ALL))
        except UserError as error:
            refused.append(name if f"does not go with --method {name}" in str(error) else str(error))
    sees_all = ["fedex-lora", "fedrpca", "flexlora", "flora", "hetlora", "lora-fair"]
    clustered = ["fedlease", "fedtreelora", "hilora"]
    assert refused == sorted(["ce-lora", "fedalt", "fedmosaic", "local", "pfedmoap", *clustered, *sees_all])


def test_a_comparison_leaves_privacy_out_where_nothing_is_shared():
    base = Run(privacy=ALL)
    validate_comparison(Compare(methods=("local", "plora"), base=base))
    assert for_method(base, "local").privacy == PrivacyOptions()
    assert for_method(base, "plora").privacy == ALL
    with pytest.raises(UserError, match="means nothing to any of --methods local"):
        validate_comparison(Compare(methods=("local",), base=base))
    with pytest.raises(UserError, match="does not go with --methods flora"):
        validate_comparison(Compare(methods=("local", "flora"), base=base))


PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "differential-privacy.md").read_text(encoding="utf-8")


@pytest.mark.broad
def test_the_table_of_the_page_is_the_accountants():
    kinds = [("poisson", 10, 34), ("fixed", 10, 10), ("all", 1000, 1000)]
    for kind, expected, places in kinds:
        found = find_epsilon(1.0, Sampling(kind, 1000, expected, places), 100, 1e-5)
        assert re.search(rf"^\| `{kind}` .*\| {found:.{1 if found > 1 else 2}f} \|$", PAGE, re.MULTILINE), found


@pytest.mark.slow
def test_the_line_of_the_page_is_what_a_run_says():
    budget = settle(PrivacyOptions(epsilon=8.0, clip=0.5), clients=4000, cohort=256, rounds=50)
    assert describe_budget(budget, 50) in " ".join(PAGE.split())
