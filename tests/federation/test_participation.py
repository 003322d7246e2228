"""Who is drawn, who drops out, who straggles: by hand, by moments, and what it may never depend on."""

import jax
import numpy as np
import pytest
from federation.test_cohort import make_examples
from federation.test_cohort import read as read_numbers
from hypothesis import given
from hypothesis import strategies as st
from toy import LABELS, RATES, VOCABULARY, WIDTH, make_method

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.client_states import ClientStates
from fedvlm_jax.federation.cohort import choose_layout, make_clients
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.participation import draw_cohort, draw_turnout
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.methods.config import LocalOptions, ServerOptions
from fedvlm_jax.methods.zoo import pfedme

SMALL = st.integers(0, 50)
CHANCE = st.floats(0, 1)


# --- Drawing a cohort ---


def test_sampling_by_size_has_the_chances_of_drawing_one_after_another():
    """Sizes 1, 2, 3, two of three: 1 is out in 1 - [1/6 + (1/3)(1/4) + (1/2)(1/3)] = 7/12 of the rounds, by hand."""
    rounds = 6000
    seen = np.zeros(3)
    for round_ in range(rounds):
        seen[draw_cohort(3, round_, 3, 2, np.asarray([1, 2, 3]))] += 1
    expected = np.asarray([
        1 / 6 + (1 / 3) * (1 / 4) + (1 / 2) * (1 / 3),
        1 / 3 + (1 / 6) * (2 / 5) + (1 / 2) * (2 / 3),
        1 / 2 + (1 / 6) * (3 / 5) + (1 / 3) * (3 / 4),
    ])  # fmt: skip
    assert expected.sum() == pytest.approx(2)
    error = np.sqrt(expected * (1 - expected) / rounds)
    assert (np.abs(seen / rounds - expected) < 4 * error).all()


def test_one_client_by_size_is_drawn_in_proportion_and_uniform_is_not():
    sizes, rounds = np.asarray([10, 30, 60]), 4000
    by_size, uniform = np.zeros(3), np.zeros(3)
    for round_ in range(rounds):
        by_size[draw_cohort(0, round_, 3, 1, sizes)] += 1
        uniform[draw_cohort(0, round_, 3, 1)] += 1
    for seen, chances in ((by_size, sizes / 100), (uniform, np.full(3, 1 / 3))):
        assert (np.abs(seen / rounds - chances) < 4 * np.sqrt(chances * (1 - chances) / rounds)).all()


@given(seed=SMALL, round_=SMALL, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), cohort=st.integers(1, 12))
def test_a_cohort_is_a_set_and_those_without_examples_come_last(seed, round_, sizes, cohort):
    sizes = np.asarray(sizes)
    drawn = draw_cohort(seed, round_, len(sizes), cohort, sizes)
    assert len(drawn) == min(cohort, len(sizes))
    assert (np.diff(drawn) > 0).all()
    assert (sizes[drawn] > 0).sum() == min(len(drawn), (sizes > 0).sum())


def test_every_seed_and_round_draws_its_own_cohorts():
    sizes = np.arange(1, 31)
    for by in (None, sizes):
        drawn = {tuple(draw_cohort(seed, round_, 30, 5, by)) for seed in range(4) for round_ in range(4)}
        assert len(drawn) == 16


# --- Dropping out and straggling ---


@given(
    seed=SMALL, round_=SMALL, dropout=CHANCE, stragglers=CHANCE, steps=st.integers(1, 9),
    cohort=st.lists(st.integers(0, 40), min_size=1, max_size=10, unique=True), data=st.data(),
)  # fmt: skip
def test_what_becomes_of_a_client_is_its_own(seed, round_, dropout, stragglers, steps, cohort, data):
    """Not the order, nor who else is there, nor what somebody else's steps are."""
    options = ParticipationOptions(dropout=dropout, stragglers=stragglers)
    numbers = np.asarray(cohort)
    together = draw_turnout(seed, round_, numbers, np.full(len(numbers), steps), options)
    order = np.asarray(data.draw(st.permutations(range(len(numbers)))))
    shuffled = draw_turnout(seed, round_, numbers[order], np.full(len(numbers), steps), options)
    for place, number in enumerate(cohort):
        alone = draw_turnout(seed, round_, np.asarray([number]), np.asarray([steps]), options)
        assert [part[place] for part in together] == [part[0] for part in alone]
    assert all((part[order] == other).all() for part, other in zip(together, shuffled, strict=True))


@given(seed=SMALL, round_=SMALL, dropout=CHANCE, stragglers=CHANCE, steps=st.lists(st.integers(0, 6), min_size=1))
def test_steps_are_none_fewer_or_all(seed, round_, dropout, stragglers, steps):
    steps = np.asarray(steps)
    options = ParticipationOptions(dropout=dropout, stragglers=stragglers)
    got = draw_turnout(seed, round_, np.arange(len(steps)), steps, options)
    assert (got.steps[got.dropped] == 0).all()
    assert (got.steps[got.late] >= 1).all()
    assert (got.steps[got.late] < steps[got.late]).all()
    whole = ~got.dropped & ~got.late
    assert (got.steps[whole] == steps[whole]).all()
    assert not (got.dropped & got.late).any()
    if stragglers == 1:
        assert (got.late | got.dropped | (steps < 2)).all()


@given(seed=SMALL, round_=SMALL, low=CHANCE, high=CHANCE)
def test_a_higher_chance_only_adds(seed, round_, low, high):
    """So comparing rates of dropout compares the same misfortunes."""
    low, high = sorted((low, high))
    steps = np.full(20, 5)
    few, many = (
        draw_turnout(seed, round_, np.arange(20), steps, ParticipationOptions(dropout=chance)) for chance in (low, high)
    )
    assert not (few.dropped & ~many.dropped).any()


def test_moments_of_dropping_out_and_straggling():
    """Chances are as stated, independent of each other, and the stragglers' steps are uniform on 1 … 4."""
    clients = 20_000
    got = draw_turnout(
        5, 7, np.arange(clients), np.full(clients, 5), ParticipationOptions(dropout=0.3, stragglers=0.25)
    )
    late = 0.7 * 0.25
    for seen, chance in ((got.dropped, 0.3), (got.late, late)):
        assert abs(seen.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / clients)
    counts = np.bincount(got.steps[got.late], minlength=5)[1:]
    expected = counts.sum() / 4
    assert len(counts) == 4
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square with 3 degrees of freedom, 0.1 %
    rounds = np.stack([
        draw_turnout(5, round_, np.arange(400), np.full(400, 5), ParticipationOptions(dropout=0.3)).dropped
        for round_ in range(50)
    ])  # fmt: skip
    spread = rounds.mean(axis=0).std()
    assert abs(spread - np.sqrt(0.3 * 0.7 / 50)) < 0.01, "a client's rounds are independent of each other"


def test_being_drawn_says_nothing_about_dropping_out():
    """Both come from the same seed, through streams of their own."""
    sizes, drawn, left = np.full(40, 5), 0, 0
    for round_ in range(800):
        cohort = draw_cohort(1, round_, 40, 10, sizes)
        got = draw_turnout(1, round_, cohort, np.full(10, 4), ParticipationOptions(dropout=0.4))
        drawn, left = drawn + len(cohort), left + got.dropped.sum()
    assert abs(left / drawn - 0.4) < 4 * np.sqrt(0.4 * 0.6 / drawn)


# --- What a round reads ---


def test_the_others_weights_add_up_to_one():
    """Sizes 2, 3, 5 of which 3 drops out: 2/7 and 5/7; uniform, a half each."""
    examples, numbers = make_examples([2, 3, 5]), np.arange(3)
    layout = choose_layout([2, 3, 5], cohort=None, wave=None, devices=1, steps=4, batch=4)
    for weighting, wanted in (("examples", [2 / 7, 0, 5 / 7]), ("uniform", [0.5, 0, 0.5])):
        clients, weights = make_clients(0, 1, numbers, examples, read_numbers, layout, weighting, np.asarray([4, 0, 1]))
        np.testing.assert_allclose(weights, wanted, rtol=1e-6)
        np.testing.assert_array_equal(clients.weight[0], weights)
    assert clients.mask[0].any(axis=-1).sum(axis=-1).tolist() == [4, 0, 1]


def test_a_straggler_takes_the_first_of_its_own_steps():
    examples, layout = make_examples([9]), choose_layout([9], cohort=None, wave=None, devices=1, steps=4, batch=3)
    rows = {}
    for steps in (2, 4):
        clients, _ = make_clients(0, 1, np.arange(1), examples, read_numbers, layout, "examples", np.asarray([steps]))
        at = clients.indices[0, 0][clients.mask[0, 0]]
        rows[steps] = clients.examples["image_features"][0, 0][at, 0]
    assert len(rows[2]) == 6
    np.testing.assert_array_equal(rows[2], rows[4][:6])


def test_nobody_reads_the_rows_of_who_dropped_out():
    asked = []
    layout = choose_layout([9, 9], cohort=None, wave=None, devices=1, steps=3, batch=3)
    make_clients(
        0, 1, np.arange(2), make_examples([9, 9]),
        lambda rows: asked.append(rows) or read_numbers(rows), layout, "examples", np.asarray([3, 0]),
    )  # fmt: skip
    assert set(asked[0][1].tolist()) == {0}, "padding, and not rows 9 to 17"


# --- Rounds ---


SIZES = [9, 12, 4, 30]
KINDS = {
    "a rule, a server that remembers": ("plora", {"server": ServerOptions("adam", 0.1)}),
    "control variates": ("fedavg-lora", {"local": LocalOptions(scaffold=True)}),
    "a base that moves": ("flora", {}),
    "a second model": ("ditto", {}),
    "local rounds": ("pfedme", {"options": pfedme.Options(inner=2)}),
    "downloads of one's own": ("fedmosaic", {}),
    "two stages": ("feddpa-t", {}),
    "another average": ("hetlora", {}),
}
RNG = np.random.default_rng(11)
TABLE = {
    "image_features": RNG.normal(size=(sum(SIZES), WIDTH)).astype(np.float32),
    "labels": RNG.integers(0, VOCABULARY, (sum(SIZES), LABELS)).astype(np.int32),
}


def read(rows):
    return {name: array[rows] for name, array in TABLE.items()}


class Case:
    """A method's programs, compiled once for all federations on it."""

    def __init__(self, name, **choices):
        _, self.params, self.trainer, self.method, self.adapter = make_method(name, optimizer="sgd", **choices)
        self.programs = Programs(self.method, self.trainer, make_mesh(1))

    def start(self, *, sizes=SIZES, steps=4, cohort=None, seed=0, weighting="examples", **choices):
        return Simulator(
            programs=self.programs, params=self.params, examples=make_examples(sizes), inputs=read,
            layout=choose_layout(sizes, cohort=cohort, wave=len(sizes), devices=1, steps=steps, batch=4), seed=seed,
            key=jax.random.key(0), weighting=weighting, server=self.method.init(adapter=self.adapter), **choices,
        )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    name, choices = KINDS[request.param]
    return Case(name, **choices)


def read_steps(simulator, round_, steps, numbers=(0, 1, 2, 3)):
    """A round in which these clients take so many steps, whatever was drawn."""
    numbers = np.asarray(numbers)
    clients, weights = make_clients(
        0, round_, numbers, simulator.examples, read, simulator.layout, "examples", np.asarray(steps)
    )
    return simulator.read_round(round_)._replace(numbers=numbers, clients=clients, weights=weights)


ROUNDING = {"rtol": 1e-4, "atol": 2e-6}
"""Sums over three clients, or over four of which one counts nothing."""


def copy(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def assert_same(one, two, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 0, "atol": 0, **tolerance}), one, two)


def rest_of(simulator):
    """The server, and the states of all clients but the second."""
    return copy((simulator.server, simulator.client_states.gather([0, 2, 3])))


@pytest.mark.broad
def test_who_drops_out_leaves_no_trace(case):
    """It keeps its state to the bit, and the others end up as if it had not been drawn, and not as if it had stayed."""
    dropped, never, stayed = (case.start() for _ in range(3))
    for simulator in (dropped, never, stayed):
        simulator.run_round(read_steps(simulator, 1, [4] * 4), RATES)
    before = copy(dropped.client_states.gather([1]))
    report = dropped.run_round(read_steps(dropped, 2, [4, 0, 4, 2]), RATES)
    never.run_round(read_steps(never, 2, [4, 4, 2], (0, 2, 3)), RATES)
    stayed.run_round(read_steps(stayed, 2, [4, 4, 4, 2]), RATES)
    assert report.counted.tolist() == [0, 2, 3]
    assert_same(dropped.client_states.gather([1]), before)
    assert_same(rest_of(dropped), rest_of(never), **ROUNDING)
    with pytest.raises(AssertionError):
        assert_same(rest_of(dropped), rest_of(stayed), **ROUNDING)


def test_a_newcomer_that_drops_out_is_still_new(case):
    """In its next round it begins as somebody who was never there, from what the server is then."""
    dropped, never = case.start(), case.start()
    dropped.run_round(read_steps(dropped, 1, [4, 0, 4, 4]), RATES)
    assert dropped.client_states.known.tolist() == [True, False, True, True]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(dropped.client_states.gather([1])))
    never.run_round(read_steps(never, 1, [4, 4, 4], (0, 2, 3)), RATES)
    for simulator in (dropped, never):
        simulator.run_round(read_steps(simulator, 2, [4] * 4), RATES)
        assert simulator.client_states.known.all()
    assert_same(rest_of(dropped), rest_of(never), **ROUNDING)
    assert_same(dropped.client_states.gather([1]), never.client_states.gather([1]), **ROUNDING)


def test_where_everybody_drops_out_nothing_changes(case):
    simulator = case.start()
    simulator.run_round(read_steps(simulator, 1, [4, 4, 0, 4]), RATES)
    before = copy(simulator.state())
    report = simulator.run_round(read_steps(simulator, 2, [0] * 4), RATES)
    assert_same(copy(simulator.state()), before)
    assert len(report.counted) == 0
    assert report.trained is None
    assert report.bytes_up == 0
    assert (report.metrics["steps"] == 0).all()


def test_states_that_stay_on_the_devices_are_those_of_the_file(case, monkeypatch):
    """Where everybody takes part, states go to the file and do not come back; all ends the same, to the bit."""
    staying, returning = case.start(), case.start()
    asked = []
    gather = ClientStates.gather
    monkeypatch.setattr(ClientStates, "gather", lambda self, *given: asked.append(self) or gather(self, *given))
    for round_, steps in enumerate([[4] * 4, [4] * 4, [4, 0, 4, 2], [4] * 4, [4] * 4], 1):
        returning._left = None
        for simulator in (staying, returning):
            simulator.run_round(read_steps(simulator, round_, steps), RATES)
    assert asked.count(returning.client_states) == 5
    assert asked.count(staying.client_states) == 2, "at the start, and after somebody had dropped out"
    whole = [copy((simulator.server, gather(simulator.client_states, range(4)))) for simulator in (staying, returning)]
    assert_same(*whole)


def test_states_on_the_devices_do_not_outlive_those_that_were_loaded(case):
    """A simulator that goes back to an earlier table goes on from there."""
    simulator, other = case.start(), case.start()
    for one in (simulator, other):
        one.run_round(read_steps(one, 1, [4] * 4), RATES)
    early = jax.tree.map(np.array, jax.device_get(simulator.state()))
    simulator.client_states.keep("early")
    simulator.run_round(read_steps(simulator, 2, [4] * 4), RATES)
    simulator.load(early)
    for one in (simulator, other):
        one.run_round(read_steps(one, 2, [4] * 4), RATES)
    assert_same(copy(simulator.client_states.gather(range(4))), copy(other.client_states.gather(range(4))))


def test_a_straggler_s_loss_is_that_of_the_steps_it_took(case):
    """And no zero from a stage that it did not reach. One step at the start is the same step for all of them."""
    simulator = case.start()
    metrics = simulator.run_round(read_steps(simulator, 1, [4, 0, 1, 2]), RATES).metrics
    assert metrics["steps"].tolist() == [4, 0, 1, 2]
    assert (metrics["loss"][[0, 2, 3]] > 1).all()
    assert (metrics["last_loss"][[0, 2, 3]] > 1).all()
    np.testing.assert_allclose(metrics["loss"][2], metrics["last_loss"][2], rtol=1e-6)


def test_masks_are_data(case):
    """One program for rounds with and without dropouts and stragglers, whoever they are."""
    simulator = case.start()
    for round_, steps in enumerate(([4] * 4, [4, 0, 1, 3], [0] * 4, [2, 2, 2, 0]), 1):
        simulator.run_round(read_steps(simulator, round_, steps), RATES)
    assert len(case.programs.compiled) == 1


def test_turnout_is_told_where_it_may_happen_and_the_same_for_every_method():
    options = ParticipationOptions(sampling="size", dropout=0.4, stragglers=0.5)
    one = Case("local").start(cohort=3, participation=options)
    two = Case("plora").start(cohort=3, participation=options)
    told = []
    for round_ in range(1, 9):
        first, second = one.read_round(round_), two.read_round(round_)
        assert_same(tuple(first.clients), tuple(second.clients))
        assert first.turnout == second.turnout
        assert first.turnout["dropped"] == 3 - len(first.counted)
        told.append(first.turnout)
    assert len({turnout["dropped"] for turnout in told}) > 1
    assert sum(turnout["stragglers"] for turnout in told) > 1
    assert one.read_round(3).turnout == told[2], "reading again, in whatever order, draws the same"
    assert Case("local").start().read_round(1).turnout == {}


def test_bytes_are_those_of_who_sent():
    """Ranks 2, 1, 2, 1: 74 floats at rank 2, 37 at rank 1, and the rank itself, 4 bytes."""
    simulator = Case("fedavg-lora", ranks=(2, 1, 2, 1)).start(ranks=(2, 1, 2, 1))
    whole = simulator.run_round(read_steps(simulator, 1, [4] * 4), RATES)
    one = simulator.run_round(read_steps(simulator, 2, [4, 0, 0, 0]), RATES)
    nobody = simulator.run_round(read_steps(simulator, 3, [0] * 4), RATES)
    assert (whole.bytes_up, one.bytes_up, nobody.bytes_up) == (222 + 4, 296 + 4, 0)
    assert one.bytes_down == whole.bytes_down == nobody.bytes_down == 226, "who drops out had received"


def test_stacked_messages_are_those_that_were_sent():
    """FLoRA's download is everybody's factors: of three clients, where the fourth dropped out."""
    simulator = Case("flora").start()
    whole, three = (
        simulator.run_round(read_steps(simulator, n, [4, 4, 4, last]), RATES) for n, last in ((1, 4), (2, 0))
    )
    assert (whole.bytes_up, whole.bytes_down, three.bytes_up, three.bytes_down) == (296, 4 * 296, 296, 3 * 296)


def test_a_mixture_goes_to_who_was_drawn():
    simulator = Case("fedmosaic").start()
    assert simulator.run_round(read_steps(simulator, 1, [4, 0, 4, 4]), RATES).bytes_down == 296
    assert simulator.run_round(read_steps(simulator, 2, [0] * 4), RATES).bytes_down == 296


def test_epochs_give_every_client_its_own_steps():
    """Nine, twelve, four and thirty examples in batches of four: 5, 6, 2 and 15 steps are two epochs."""
    simulator = Case("local").start(steps=15, epochs=2)
    steps = simulator.read_round(1).clients.mask[0].any(axis=-1).sum(axis=-1)
    assert steps.tolist() == [5, 6, 2, 15]
    report = simulator.run_round(simulator.read_round(1), RATES)
    assert report.metrics["steps"].tolist() == [5, 6, 2, 15]
    late = Case("local").start(steps=15, epochs=2, participation=ParticipationOptions(stragglers=1.0))
    fewer = late.read_round(1).clients.mask[0].any(axis=-1).sum(axis=-1)
    assert ((fewer >= 1) & (fewer < steps)).all(), "a straggler's steps are fewer than its own"
