"""The private part of who never trained, of clients that were not drawn yet as of those that are held out."""

from types import SimpleNamespace

import numpy as np
import pytest
from federation.test_participation import Case, read_steps
from toy import RATES

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.training.personalization import give_models

RANKS = (1, 2, 2, 1)
LIKE = np.asarray([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0], [0.1, 1.0]])
"""Images' features: of the last two, that were not drawn, the first is like client 0 and the other like client 1."""


@pytest.fixture(scope="module")
def simulator():
    """plora after a round of the first two clients, of rank 1 and 2."""
    simulator = Case("plora", ranks=RANKS).start(ranks=RANKS)
    simulator.run_round(read_steps(simulator, 1, [4, 4], (0, 1)), RATES)
    assert simulator.client_states.known.tolist() == [True, True, False, False]
    return simulator


def models_of(simulator, kind):
    experiment = SimpleNamespace(
        run=SimpleNamespace(evaluation=SimpleNamespace(cold_start=kind)),
        model=SimpleNamespace(mesh=make_mesh(1)),
        data=SimpleNamespace(client_means=lambda inputs: LIKE),
        inputs=None,
        layout=SimpleNamespace(wave=2),
    )
    site = give_models(experiment, simulator, simulator.now)(np.arange(4))["encoder"]["fc1"]
    return np.asarray(site["a"]), np.asarray(site["b"])


def test_a_client_that_was_not_drawn_yet_has_the_mean_of_the_others(simulator):
    """Of each direction over those who have it, and in a rank of its own: ranks have no mean."""
    a, b = models_of(simulator, "mean")
    np.testing.assert_allclose(a[2][:, 0], a[:2, :, 0].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(a[2][:, 1], a[1][:, 1], rtol=1e-6)
    np.testing.assert_array_equal(a[3], np.stack([a[2][:, 0], 0 * a[2][:, 1]], axis=1))
    shared = np.asarray(simulator.server["shared"]["encoder"]["fc1"]["b"])
    np.testing.assert_array_equal(b[2], shared)
    np.testing.assert_array_equal(b[3], shared * [[1], [0]])
    assert np.abs(shared[1]).max() > 0


def test_what_the_nearest_client_lacks_is_that_of_the_own_start(simulator):
    a, b = models_of(simulator, "nearest")
    start = np.asarray(simulator.server["start"]["encoder"]["fc1"]["a"])
    np.testing.assert_array_equal(a[2], np.stack([a[0][:, 0], start[:, 1]], axis=1))
    np.testing.assert_array_equal(a[3], np.stack([a[1][:, 0], 0 * start[:, 1]], axis=1))
    assert np.abs(b[2][1]).max() > 0
    assert not b[3][1].any()


def test_by_default_it_begins_as_everybody_did(simulator):
    (a, b), (mean, _) = models_of(simulator, "initial"), models_of(simulator, "mean")
    np.testing.assert_array_equal(a[2], np.asarray(simulator.server["start"]["encoder"]["fc1"]["a"]))
    assert np.abs(a[2] - mean[2]).max() > 1e-4
    assert np.abs(b[2]).max() > 0
