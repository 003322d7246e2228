"""ε of every way to draw clients: as dp-accounting has it when it is asked by itself, and as it was once written down.

The numbers are from dp-accounting 0.6.0 at its own grid.
"""

import logging
import math

import dp_accounting as dp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy import accounting
from fedvlm_jax.privacy.accounting import bound_epsilon, count_rounds, find_epsilon, find_noise
from fedvlm_jax.privacy.sampling import Sampling

WITHOUT = dp.NeighboringRelation.REPLACE_ONE


def poisson(population, expected, places=None, groups=1):
    """Without `places` as many as there are clients: nothing is cut."""
    return Sampling("poisson", population, expected, places or population, groups)


def everybody(clients=20):
    return Sampling("all", clients, clients, clients)


def fixed(population, expected, groups=1):
    return Sampling("fixed", population, expected, expected, groups)


def ask_pld(event, rounds, delta):
    return pytest.approx(dp.pld.PLDAccountant().compose(event, rounds).get_epsilon(delta), rel=1e-9)


def ask_rdp(event, rounds, delta, relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE):
    accountant = dp.rdp.RdpAccountant(neighboring_relation=relation)
    return pytest.approx(accountant.compose(event, rounds).get_epsilon(delta), rel=1e-9)


@pytest.mark.parametrize(
    ("noise", "sampling", "rounds", "delta", "exact", "bound"),
    [
        (1.0, poisson(1000, 10), 100, 1e-5, 0.718037, 1.214145),
        (1.0, poisson(1000, 100), 50, 1e-5, 5.148263, 5.885427),
        (2.0, poisson(16, 8), 20, 1e-4, 4.897734, 5.461514),
        (5.0, everybody(), 100, 1e-5, 9.997256, 10.725510),
        (0.8, poisson(1000, 8), 1000, 1e-6, 3.016732, 3.594346),
        (0.7, poisson(1000, 64), 200, 1e-4, 11.376538, 13.070283),
        (1.0, poisson(1000, 10, places=30), 100, 1e-5, 0.718123, None),
        pytest.param(1.0, poisson(1000, 10, places=20), 100, 1e-5, 2.257471, None, marks=pytest.mark.broad),
        pytest.param(1.0, poisson(1000, 64, places=128), 50, 1e-4, 2.721381, None, marks=pytest.mark.broad),
        (1.0, fixed(1000, 10), 100, 1e-5, 11.212675, 11.212675),
        (1.0, fixed(16, 8), 16, 1e-3, 59.006727, 59.006727),
    ],
)
def test_vectors(noise, sampling, rounds, delta, exact, bound):
    assert find_epsilon(noise, sampling, rounds, delta) == pytest.approx(exact, abs=1e-3)
    if bound is not None:
        assert bound_epsilon(noise, sampling, rounds, delta) == pytest.approx(bound, abs=1e-3)


@pytest.mark.broad
def test_it_is_what_dp_accounting_says_of_the_event():
    """The very number, of rounds that are asked for one after another from what is kept of the first."""
    cut = poisson(500, 20, places=40)
    event = dp.TruncatedSubsampledGaussianDpEvent(500, 0.04, 40, 1.1)
    for rounds in (3, 7):
        assert find_epsilon(1.1, cut, rounds, 1e-4) == ask_pld(event, rounds, 1e-4)
    once = dp.PoissonSampledDpEvent(0.25, dp.GaussianDpEvent(1.5))
    assert find_epsilon(1.5, poisson(20, 5), 6, 1e-3) == ask_pld(once, 6, 1e-3)
    assert find_epsilon(3.0, everybody(), 6, 1e-3) == ask_pld(dp.GaussianDpEvent(3.0), 6, 1e-3)


def test_clients_of_a_fixed_number_are_accounted_by_replacing_one():
    """One of 1000 replaced moves the sum by 2 C, so the noise counts half: passing z itself would tell 1.48."""
    half, whole = (dp.SampledWithoutReplacementDpEvent(1000, 10, dp.GaussianDpEvent(z)) for z in (0.5, 1.0))
    assert find_epsilon(1.0, fixed(1000, 10), 100, 1e-5) == ask_rdp(half, 100, 1e-5, WITHOUT)
    assert find_epsilon(2.0, fixed(1000, 10), 100, 1e-5) == ask_rdp(whole, 100, 1e-5, WITHOUT)
    assert bound_epsilon(2.0, fixed(1000, 10), 100, 1e-5) == pytest.approx(1.482526, abs=1e-6)


@pytest.mark.parametrize(("rounds", "turns"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_client_is_in_one_round_of_as_many_as_there_are_groups(rounds, turns):
    """Of four groups of 10 the first has its turn in rounds 1, 5, 9; each draws with four times the chance."""
    once = dp.PoissonSampledDpEvent(0.4, dp.GaussianDpEvent(2.0))
    assert find_epsilon(2.0, poisson(40, 4, places=10, groups=4), rounds, 1e-3) == ask_pld(once, turns, 1e-3)
    alone = Sampling("all", 40, 10, 10, 4)
    assert find_epsilon(2.0, alone, rounds, 1e-3) == ask_pld(dp.GaussianDpEvent(2.0), turns, 1e-3)
    drawn = dp.SampledWithoutReplacementDpEvent(10, 4, dp.GaussianDpEvent(1.0))  # of the smaller group of 10 and 11
    assert find_epsilon(2.0, fixed(43, 4, groups=4), rounds, 1e-3) == ask_rdp(drawn, turns, 1e-3, WITHOUT)


def test_the_fast_bound_of_a_cut_sample_takes_the_cut_into_account():
    """It is the untruncated one's at a smaller δ, and so between that and the exact number of a sample that is cut."""
    whole, cut = poisson(1000, 10), poisson(1000, 10, places=34)
    bounds = [bound_epsilon(1.0, sampling, 100, 1e-5) for sampling in (whole, cut)]
    assert find_epsilon(1.0, cut, 100, 1e-5) < bounds[0] < bounds[1] < 1.01 * bounds[0]
    # A round of 15 places is too small so often that nothing is left of δ.
    assert bound_epsilon(1.0, poisson(1000, 10, places=15), 100, 1e-5) == math.inf


@settings(deadline=None, max_examples=6)
@given(
    noise=st.floats(0.7, 4),
    rounds=st.integers(1, 200),
    expected=st.integers(1, 99),
    kind=st.sampled_from(["p", "f", "a"]),
)
def test_epsilon_grows_with_rounds_and_falls_with_noise_and_delta(noise, rounds, expected, kind):
    sampling = {"p": poisson(100, expected), "f": fixed(100, expected), "a": everybody(100)}[kind]
    here = bound_epsilon(noise, sampling, rounds, 1e-5)
    assert 0 < here <= bound_epsilon(noise, sampling, rounds + 1, 1e-5)
    assert bound_epsilon(1.1 * noise, sampling, rounds, 1e-5) <= here
    assert bound_epsilon(noise, sampling, rounds, 1e-4) <= here
    if kind != "a":
        assert here <= bound_epsilon(noise, sampling._replace(expected=expected + 1), rounds, 1e-5)


def test_the_exact_epsilon_does_so_too_and_is_below_the_bound():
    sampling, at = poisson(100, 10), {}
    for noise in (1.0, 1.5):
        for rounds in (1, 2, 10):
            at[noise, rounds] = find_epsilon(noise, sampling, rounds, 1e-3)
            assert at[noise, rounds] < bound_epsilon(noise, sampling, rounds, 1e-3)
    assert at[1.0, 1] < at[1.0, 2] < at[1.0, 10] > at[1.5, 10] > at[1.5, 2] > at[1.5, 1]


def test_no_rounds_spend_nothing_and_rounds_without_noise_everything():
    assert find_epsilon(1.0, poisson(100, 10), 0, 1e-5) == 0
    assert find_epsilon(0.0, everybody(), 1, 1e-5) == math.inf


def test_much_of_it_is_told_by_the_bound_rather_than_by_gigabytes():
    sampling = poisson(100, 50)
    assert find_epsilon(0.01, sampling, 50, 1e-5) == bound_epsilon(0.01, sampling, 50, 1e-5) > 1e5


@pytest.mark.parametrize(
    ("sampling", "rounds", "delta", "epsilon"),
    [
        pytest.param(everybody(16), 10, 1e-3, 3.0, id="all", marks=pytest.mark.broad),
        pytest.param(fixed(64, 8), 10, 1e-3, 30.0, id="fixed"),
        pytest.param(poisson(64, 16), 10, 1e-3, 2.0, id="poisson", marks=pytest.mark.broad),
    ],
)
def test_the_noise_for_an_epsilon_is_the_smallest_that_keeps_to_it(sampling, rounds, delta, epsilon):
    noise = find_noise(sampling, rounds, delta, epsilon)
    assert epsilon * (1 - 2e-3) < find_epsilon(noise, sampling, rounds, delta) <= epsilon
    assert noise == float(f"{noise:.5g}")


@pytest.mark.parametrize("more", [1.0, 1.000001, 1.4])
def test_the_noise_of_a_sample_that_is_cut_is_that_of_its_cut(more, monkeypatch):
    """By an ε that is worked out by hand, T / z², and more where the sample is cut: rarely, or often."""
    cut = poisson(1000, 10, places=34)
    monkeypatch.setattr(
        accounting, "find_epsilon", lambda z, drawn, rounds, delta: rounds / z**2 * (more if drawn == cut else 1)
    )
    accounting.find_noise.cache_clear()
    exact = math.sqrt(50 * more / 3)
    assert exact <= find_noise(cut, 50, 1e-5, 3.0) <= exact * (1 + 1.1e-4)
    accounting.find_noise.cache_clear()


def test_noise_by_renyi_as_it_was_written_down(monkeypatch):
    """ε 8, δ 1e-5, q 0.1, T 50 by Rényi's alone: z = 0.857344."""
    monkeypatch.setattr(accounting, "LARGE", 0.0)
    accounting.find_noise.cache_clear()
    assert find_noise(poisson(500, 50), 50, 1e-5, 8.0) == pytest.approx(0.857344, abs=2e-5)
    accounting.find_noise.cache_clear()


def test_an_epsilon_that_no_noise_keeps_to_is_refused(monkeypatch):
    monkeypatch.setattr(accounting, "MOST", 8.0)
    monkeypatch.setattr(accounting, "LARGE", 0.0)
    with pytest.raises(UserError, match=r"--privacy.epsilon 0.01 .* cannot be kept to over 5 rounds"):
        find_noise(everybody(16), 5, 1e-5, 0.01)
    with pytest.raises(UserError, match=r"--privacy.epsilon 1e\+09 protects nobody"):
        find_noise(everybody(16), 5, 1e-5, 1e9)


def test_rounds_for_an_epsilon(monkeypatch):
    monkeypatch.setattr(accounting, "LARGE", 0.0)  # by the fast bound
    sampling = everybody(16)
    rounds = count_rounds(4.0, sampling, 1e-3, 5.0, most=100)
    assert find_epsilon(4.0, sampling, rounds, 1e-3) <= 5 < find_epsilon(4.0, sampling, rounds + 1, 1e-3)
    assert count_rounds(4.0, sampling, 1e-3, 5.0, most=rounds - 1) == rounds - 1
    assert count_rounds(4.0, sampling, 1e-3, 0.1, most=100) == 0


def test_orders_that_do_not_converge_are_not_shown(caplog):
    with caplog.at_level(logging.WARNING):
        bound_epsilon(0.5, poisson(16, 8), 5, 1e-3)
        assert not caplog.records
        ask_rdp(dp.PoissonSampledDpEvent(0.5, dp.GaussianDpEvent(0.5)), 5, 1e-3)
        assert caplog.records  # of the accountant by itself


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"--privacy needs the package dp-accounting.*pip install '\.\[privacy\]'"):
        find_epsilon(1.0, everybody(), 1, 1e-5)
