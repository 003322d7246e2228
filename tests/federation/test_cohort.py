"""Who takes part and in what shapes: very unequal clients, clients without rows, held-out clients."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import LABELS, RATES, WIDTH, make_method

from fedvlm_jax.data.batches import bucket
from fedvlm_jax.data.federated_dataset import ClientRows
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.cohort import choose_layout, make_clients
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.participation import find_shares
from fedvlm_jax.federation.simulator import Simulator

NONE = np.empty(0, np.int64)


def make_examples(sizes, held_out=()):
    """Clients with so many training rows each, numbered through."""
    rows = [np.arange(start, end) for start, end in itertools.pairwise(np.cumsum([0, *sizes]))]
    clients = tuple(
        ClientRows(f"c{n}", NONE if n in held_out else own, NONE, own, held_out=n in held_out)
        for n, own in enumerate(rows)
    )
    return SimpleNamespace(clients=clients)


def read(rows):
    """Inputs that show which rows were asked for."""
    shape = np.shape(rows)
    return {
        "image_features": np.broadcast_to(np.asarray(rows, np.float32)[..., None] / 1e5, (*shape, WIDTH)),
        "labels": np.full((*shape, LABELS), 1, np.int32),
    }


def test_one_client_with_ninety_per_cent_of_the_rows_does_not_widen_the_others():
    """RLAIF-V's size, one source with 90 %: a round's arrays hold what is touched, 4 steps of 8, never 75,000 rows."""
    sizes = [74_819, 4_000, 2_500, 1_500, 300, 12, 1]
    layout = choose_layout(sizes, cohort=None, wave=None, devices=1, steps=4, batch=8)
    assert layout.rows == bucket(4 * 8)
    asked = []
    clients, weights = make_clients(
        0, 1, np.arange(7), make_examples(sizes),
        lambda rows: asked.append(rows.shape) or read(rows), layout, "examples",
    )  # fmt: skip
    assert asked == [(7, 32)]
    assert clients.indices.shape == (1, 7, 4, 8)
    assert clients.mask[0, :5].all()
    assert clients.mask[0, 6].sum() == 4  # its one row once a step, and never twice in one
    np.testing.assert_allclose(weights, np.asarray(sizes) / sum(sizes), rtol=1e-6)


def test_a_client_without_rows_weighs_nothing():
    layout = choose_layout([0, 5], cohort=None, wave=None, devices=1, steps=2, batch=4)
    clients, weights = make_clients(0, 1, np.arange(2), make_examples([0, 5]), read, layout, "uniform")
    assert weights.tolist() == [0, 1]
    assert not clients.mask[0, 0].any()


def test_shares_of_all_clients_weight():
    sizes = np.asarray([2, 0, 6])
    np.testing.assert_allclose(find_shares(sizes, "examples"), [0.25, 0, 0.75])
    np.testing.assert_allclose(find_shares(sizes, "uniform"), [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("cohort", "sampling", "weighting", "shares"),
    [
        (2, "size", "uniform", [1 / 6, 2 / 6, 3 / 6]),  # drawn by size, so that is what their average aims at
        (3, "size", "uniform", [1 / 3] * 3),  # all are there, nothing is drawn
        (2, "uniform", "uniform", [1 / 3] * 3),
        (2, "uniform", "examples", [1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_shares_are_those_of_the_objective_that_the_average_aims_at(cohort, sampling, weighting, shares):
    _, params, trainer, method, adapter = make_method("local")
    sizes = [3, 6, 9]
    simulator = Simulator(
        programs=Programs(method, trainer, make_mesh(1)), params=params, examples=make_examples(sizes),
        inputs=read, layout=choose_layout(sizes, cohort=cohort, wave=None, devices=1, steps=2, batch=4), seed=0,
        key=jax.random.key(0), weighting=weighting, server=method.init(adapter=adapter),
        participation=ParticipationOptions(sampling=sampling),
    )  # fmt: skip
    drawn = simulator.read_round(1)
    np.testing.assert_allclose(drawn.clients.share.ravel(), np.asarray(shares)[drawn.numbers], rtol=1e-6)


def test_held_out_clients_are_never_in_a_cohort():
    _, params, trainer, method, adapter = make_method("plora")
    examples = make_examples([9] * 6, held_out=(1, 4))
    layout = choose_layout([9] * 4, cohort=3, wave=None, devices=1, steps=2, batch=4)
    simulator = Simulator(
        programs=Programs(method, trainer, make_mesh(1)), params=params, examples=examples, inputs=read,
        layout=layout, seed=0, key=jax.random.key(0), weighting="examples", server=method.init(adapter=adapter),
    )  # fmt: skip
    seen = set()
    for round_ in range(1, 6):
        read_ = simulator.read_round(round_)
        np.testing.assert_allclose(read_.clients.share, 1 / 4)  # of the four who can be drawn
        numbers = simulator.run_round(read_, RATES).numbers
        assert len(set(numbers.tolist())) == 3
        seen |= set(numbers.tolist())
    assert seen == {0, 2, 3, 5}
    assert simulator.client_states.known.tolist() == [True, False, True, True, False, True]
    own = simulator.adapters(np.arange(6))  # a newcomer has the server's part, and the private part that all start from
    for leaf, start in zip(jax.tree.leaves(own), jax.tree.leaves(simulator.global_adapters(np.arange(6))), strict=True):
        assert (jnp.asarray(leaf)[1] == jnp.asarray(start)[1]).all()


@pytest.mark.parametrize(
    ("cohort", "wave", "devices", "expected"),
    [
        (64, None, 4, (64, 1)),
        (72, None, 4, (36, 2)),  # and not 64 and 8, with 56 empty places
        (5, None, 4, (8, 1)),
        (17, None, 1, (9, 2)),
        (33, None, 1, (11, 3)),
        (72, 64, 4, (64, 2)),  # as it was asked for
    ],
)
def test_waves_have_few_empty_places_unless_their_width_is_given(cohort, wave, devices, expected):
    layout = choose_layout([9] * 100, cohort=cohort, wave=wave, devices=devices, steps=2, batch=2)
    assert (layout.wave, layout.waves) == expected


def test_every_process_reads_its_own_places():
    """Side by side they are what one process reads; who fills up at the end stands beside the last of the cohort."""
    sizes, asked = [3, 4, 5, 6, 7], []
    layout = choose_layout(sizes, cohort=None, wave=4, devices=4, steps=2, batch=2)
    assert (layout.waves, layout.places) == (2, 8)
    arguments = (0, 1, np.arange(5), make_examples(sizes))
    whole, weights = make_clients(*arguments, read, layout, "examples")
    parts = []
    for own in (np.arange(4), np.arange(4, 8)):
        part, same = make_clients(
            *arguments, lambda rows: asked.append(rows) or read(rows), layout, "examples", own=own
        )  # fmt: skip
        np.testing.assert_array_equal(same, weights)
        parts.append(part)
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    jax.tree.map(np.testing.assert_array_equal, together, whole)
    assert asked[1].min() >= sum(sizes[:4]), "the second process reads the last client's rows alone"
    assert not parts[1].mask.swapaxes(0, 1).reshape(4, 2, 2)[1:].any()
