"""Sampling under differential privacy: frequencies, independence, an unbiased cut, groups that take turns."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from federation.test_cohort import make_examples
from hypothesis import given
from hypothesis import strategies as st
from methods.test_contract import make_context
from scipy.stats import binom
from toy import LABELS, RATES, SPEC, VOCABULARY, WIDTH, make_method, make_toy

from fedvlm_jax.config.method_setup import make_method as make_method_of_run
from fedvlm_jax.config.method_setup import make_setup
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import choose_layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.participation import deal_groups, draw_cohort, draw_members
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.privacy.gaussian import make_gaussian_pool
from fedvlm_jax.privacy.sampling import OVERFLOW, Sampling, choose_places, plan_sampling
from fedvlm_jax.training.round_setup import choose_program_options, lay_out_sizes

ROUNDS = 4000


def play(sampling, rounds=ROUNDS, seed=3):
    """Who is drawn [rounds, population]."""
    drawn = np.zeros((rounds, sampling.population), bool)
    for number in range(rounds):
        drawn[number, draw_members(seed, number + 1, sampling)] = True
    return drawn


def test_clients_are_drawn_with_their_chance_each_by_itself():
    """Frequencies, pairs in a round, a client in consecutive rounds: each within 5 deviations of independent draws."""
    sampling = Sampling("poisson", population=12, expected=3, places=12)
    drawn, q = play(sampling).astype(float), 0.25
    error = np.sqrt(q * (1 - q) / ROUNDS)
    assert (np.abs(drawn.mean(axis=0) - q) < 5 * error).all()
    scaled = (drawn - q) / np.sqrt(q * (1 - q))
    together, later = scaled.T @ scaled / ROUNDS, scaled[1:].T @ scaled[:-1] / (ROUNDS - 1)
    assert (np.abs(together - np.eye(12)) < 6 / np.sqrt(ROUNDS)).all()
    assert (np.abs(later) < 6 / np.sqrt(ROUNDS)).all()
    sizes = np.bincount(drawn.sum(axis=1).astype(int), minlength=13)
    chances = binom.pmf(np.arange(13), 12, q)
    assert (np.abs(sizes / ROUNDS - chances) < 5 * np.sqrt(chances / ROUNDS) + 1e-3).all()


def test_what_is_too_many_is_cut_at_random():
    """Of 10 clients with chance a half 3 are kept: all as often, 30 % but for the rounds that draw fewer."""
    sampling = Sampling("poisson", population=10, expected=5, places=3)
    drawn = play(sampling)
    assert drawn.sum(axis=1).max() == 3
    sizes = binom.pmf(np.arange(11), 10, 0.5)
    mean = np.minimum(np.arange(11), 3) @ sizes / 10
    assert (np.abs(drawn.mean(axis=0) - mean) < 5 * np.sqrt(mean * (1 - mean) / ROUNDS)).all()
    full = drawn[drawn.sum(axis=1) == 3]
    together = full.astype(float).T @ full / len(full)
    pairs = together[~np.eye(10, dtype=bool)]
    assert (np.abs(pairs - 3 * 2 / (10 * 9)) < 5 * np.sqrt(1 / 15 / len(full))).all()


@given(population=st.integers(1, 400), share=st.floats(0.001, 1))
def test_places_are_the_fewest_that_all_but_one_round_in_a_billion_fit(population, share):
    expected = max(share * population, 1e-3)
    places = choose_places(population, expected)
    if places < population:
        assert binom.sf(places, population, expected / population) < OVERFLOW
    if places > 1 and expected < population:
        assert binom.sf(places - 1, population, expected / population) >= OVERFLOW


@pytest.mark.parametrize("kind", ["poisson", "fixed", "all"])
def test_groups_take_turns_so_that_nobody_comes_twice_in_so_many_rounds(kind):
    options = PrivacyOptions(noise=1.0, sampling=kind, mechanism="banded", bands=3)
    sampling = plan_sampling(options, 11, None if kind == "all" else 2)
    drawn = play(sampling, rounds=600)
    apart = [np.diff(np.flatnonzero(drawn[:, client])) for client in range(11)]
    assert all((gaps % 3 == 0).all() for gaps in apart), "only in the turns of its group"
    assert drawn.any(axis=0).all()
    assert drawn.sum(axis=1).max() <= sampling.places
    assert drawn.sum(axis=0).max() <= sampling.turns(600)
    wanted = {"poisson": 2, "fixed": 2, "all": 11 / 3}[kind]
    assert abs(drawn.sum(axis=1).mean() - wanted) < 0.3
    assert sorted(np.concatenate(deal_groups(3, 11, 3)).tolist()) == list(range(11))


def test_fixed_is_the_draw_without_privacy():
    sampling = plan_sampling(PrivacyOptions(noise=1.0, sampling="fixed"), 9, 4)
    for number in range(1, 9):
        np.testing.assert_array_equal(draw_members(5, number, sampling), draw_cohort(5, number, 9, 4))


@pytest.mark.parametrize(
    ("options", "cohort", "message"),
    [
        ({}, 11, "--cohort 11: there are only 10 clients that train"),
        ({"sampling": "all"}, 4, "--privacy.sampling all has everybody in every round"),
        ({"mechanism": "banded", "bands": 4}, 3, "only 2 clients in a group"),
        ({"mechanism": "banded", "bands": 11}, 1, "only 10 train"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, cohort, message):
    with pytest.raises(UserError, match=message):
        plan_sampling(PrivacyOptions(noise=1.0, **options), 10, cohort)


# --- In the simulator ---


@pytest.fixture(scope="module")
def make_simulator():
    """Six clients of which five train, two a round on average; states, batches and programs as in a run."""
    examples = make_examples([6, 6, 0, 6, 6, 6])
    sampling = plan_sampling(PrivacyOptions(noise=1.0), 5, 2)
    _, params, trainer, method, adapter = make_method("plora", population=6, cohort=5, places=6)
    method = with_pool(method, make_gaussian_pool(0.5, 0.1, sampling.expected))
    programs = Programs(method, trainer, make_mesh(1))

    def features(rows):
        rng = np.random.default_rng(0)
        table = rng.normal(size=(40, WIDTH)).astype(np.float32), rng.integers(0, VOCABULARY, (40, LABELS))
        return {"image_features": table[0][rows], "labels": table[1][rows].astype(np.int32)}

    def make(seed=1, wave=None):
        layout = choose_layout([6] * 5, cohort=sampling.places, wave=wave, devices=1, steps=2, batch=3)
        return Simulator(
            programs=programs, params=params, examples=examples, inputs=features, layout=layout, seed=seed,
            key=jax.random.key(seed), weighting="uniform", server=method.init(adapter=adapter), sampling=sampling,
        )  # fmt: skip

    return make


def test_a_round_without_clients_releases_noise_and_changes_nothing_else(make_simulator):
    simulator, sizes = make_simulator(), {}
    for number in range(1, 60):
        read = simulator.read_round(number)
        assert 2 not in read.numbers, "who has no examples is not drawn"
        assert read.weights.sum() == pytest.approx(min(len(read.numbers), 1))
        sizes.setdefault(len(read.numbers), number)
    assert {0, 1, 2, 3} <= sizes.keys()
    first = simulator.read_round(sizes[2])
    simulator.run_round(first, RATES)
    slots, before = simulator.client_states.slots.copy(), jax.tree.map(np.asarray, simulator.server)
    report = simulator.run_round(simulator.read_round(sizes[0]), RATES)
    assert (len(report.numbers), len(report.counted), report.bytes_up, report.bytes_down) == (0, 0, 0, 0)
    assert report.health["sampled"] == 0
    assert report.health["noise_norm"] > 0
    assert not {"clip_fraction", "noise_to_update"} & report.health.keys()
    assert report.trained is None
    np.testing.assert_array_equal(slots, simulator.client_states.slots)
    moved = jax.tree.map(
        lambda now, then: float(np.linalg.norm(now - then)), simulator.server["shared"], before["shared"]
    )
    total = np.sqrt(sum(norm**2 for norm in jax.tree.leaves(moved)))
    assert total == pytest.approx(report.health["noise_norm"], rel=1e-4)
    after = simulator.run_round(simulator.read_round(sizes[3]), RATES)
    assert (len(after.counted), after.health["sampled"]) == (3, 3)
    assert len(simulator.programs.compiled) == 1, "one program, whoever comes"


def test_waves_and_rounds_read_ahead_draw_the_same(make_simulator):
    one, other = make_simulator(), make_simulator(wave=2)
    assert (one.layout.waves, other.layout.waves) == (1, 3)
    for number in (3, 1, 2):
        assert one.read_round(number).numbers.tolist() == other.read_round(number).numbers.tolist()


# --- From a run's options ---


def test_a_run_s_options_reach_its_layout_its_pool_and_its_programs():
    """10 of 1,000 on average: 34 places, and a sum that is divided by 10; without privacy nothing of it."""
    run = Run(cohort=10, privacy=PrivacyOptions(noise=1.0, clip=1.0))
    assert lay_out_sizes(run, [9] * 1000, make_mesh(1), 10, None).cohort == 34
    assert lay_out_sizes(Run(cohort=10), [9] * 1000, make_mesh(1), 10, None).cohort == 10
    kept = choose_program_options(run)
    assert (kept.cohort, kept.privacy) == (10, run.privacy)
    assert choose_program_options(Run(cohort=10)).cohort is None, "so that runs share programs"
    setup = make_setup(run, None, lambda *_: {})
    setup = replace(setup, sites=make_toy()[0].sites, spec=SPEC, population=1200, trainable=1000)
    method, plain = make_method_of_run(run, setup), make_method_of_run(Run(), setup)
    adapter = setup.draw(jax.random.key(0))
    server = method.init(adapter=adapter)
    assert "pool" in server
    assert "pool" not in plain.init(adapter=adapter)
    messages = jax.tree.map(lambda leaf: np.zeros((34, *leaf.shape), np.float32), method.download(server=server))
    told = method.aggregate(make_context({}, None), server=server, messages=messages, weights=np.ones(34))[1]
    entries = sum(leaf[0].size for leaf in jax.tree.leaves(messages))
    assert float(told["noise_norm"]) == pytest.approx(np.sqrt(entries) / 10, rel=0.3)
    assert float(told["sampled"]) == 34
